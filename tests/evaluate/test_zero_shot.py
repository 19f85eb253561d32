"""Zero-shot results equal plain log-likelihoods; missing data is skipped and named."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import spectrim.evaluate.zero_shot as zero_shot_module
from spectrim.errors import InputError
from spectrim.evaluate.tasks import pairs
from spectrim.evaluate.zero_shot import (
    LITERATURE_TASKS,
    OFFLINE_TASKS,
    ZeroShot,
    task_difference,
    task_names,
    zero_shot,
)

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval")


@pytest.fixture(scope="module")
def words():
    found = sorted(
        {w for k in pairs.KINDS for p in pairs.sentences(k) for s in p for w in s.split()}
    )
    vocabulary = {"</s>": 0} | {word: i for i, word in enumerate(found, 1)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="</s>")


@pytest.fixture(scope="module")
def model(words):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return model


@torch.no_grad()
def log_likelihood(model, words, sentence):
    ids = torch.tensor([[0, *words(sentence)["input_ids"]]])
    log_p = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
    return float(log_p.gather(1, ids[0, 1:, None]).sum())


@needs_lm_eval
def test_accuracy_is_the_share_of_pairs_with_the_likelier_good_sentence(model, words):
    found = zero_shot(model, words, ["spectrim_agreement"], limit=12)
    right = [
        log_likelihood(model, words, good) > log_likelihood(model, words, bad)
        for good, bad in pairs.sentences("agreement")[:12]
    ]
    p = sum(right) / 12
    task = found.tasks["spectrim_agreement"]
    assert task["accuracy"] == pytest.approx(p)
    assert task["standard_error"] == pytest.approx(math.sqrt(p * (1 - p) / 11))
    assert task["samples"] == 12
    assert found.mean == pytest.approx(p)
    assert json.loads(json.dumps(found.record())) == found.record()


def test_differences_are_paired_over_questions():
    def seen(**right):
        return ZeroShot(right={name: dict(enumerate(v)) for name, v in right.items()})

    model = seen(a=[1.0, 0.0, 1.0, 0.0], b=[1.0, 1.0], alone=[1.0, 0.0])
    dense = seen(a=[1.0, 1.0, 1.0, 0.0], b=[0.0, 1.0], other=[1.0])
    found = task_difference(model, dense)
    pairs_ = torch.tensor([0.0, -1.0, 0.0, 0.0], dtype=torch.float64)
    assert set(found["tasks"]) == {"a", "b"}
    a, b = found["tasks"]["a"], found["tasks"]["b"]
    assert (a["accuracy"], a["questions"]) == (-0.25, 4)
    assert a["standard_error"] == pytest.approx(float(pairs_.std() / 2))
    assert found["mean"] == pytest.approx(0.125)
    errors = (a["standard_error"], b["standard_error"])
    assert found["mean_standard_error"] == pytest.approx(math.hypot(*errors) / 2)
    # Two models that answer alike differ by nothing, and for certain.
    same = task_difference(model, model)
    assert same["mean"] == same["mean_standard_error"] == 0


@needs_lm_eval
def test_answers_of_single_questions_are_kept_for_pairs(model, words):
    found = zero_shot(model, words, ["spectrim_agreement"], limit=12)
    right = found.right["spectrim_agreement"]
    assert len(right) == 12
    assert sum(right.values()) / 12 == pytest.approx(found.mean)
    assert "right" not in found.record()


@needs_lm_eval
def test_bars_of_lm_eval_are_off_where_the_command_line_says_so(
    model, words, monkeypatch, capfd, caplog
):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with caplog.at_level("INFO", "spectrim"):
        found = zero_shot(model, words, ["spectrim_tense"], limit=4)
    shown = capfd.readouterr().err
    assert "Tokenizing" not in shown and "Running" not in shown
    said = f"spectrim_tense: {100 * found.mean:.1f} % of 4 questions"
    assert said in [record.getMessage() for record in caplog.records]


@needs_lm_eval
def test_data_that_cannot_be_fetched_is_skipped_and_the_rest_runs(model, words, tmp_path):
    (tmp_path / "piqa.yaml").write_text(
        "task: piqa\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path}/absent.jsonl\noutput_type: multiple_choice\ntest_split: test\n"
        "doc_to_text: ''\ndoc_to_target: 0\ndoc_to_choice: '{{[good, bad]}}'\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    found = zero_shot(model, words, ["piqa", "spectrim_articles"], limit=4, task_folders=[tmp_path])
    assert list(found.tasks) == ["spectrim_articles"]
    assert "absent.jsonl" in found.skipped["piqa"]
    assert "task file" in found.skipped["piqa"]


@needs_lm_eval
def test_a_task_file_that_does_not_fit_is_skipped_and_the_rest_runs(model, words, tmp_path):
    rows = [{"good": "He came.", "bad": "He come."}] * 3 + [{"good": None, "bad": "He come."}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    choices = {"misnamed": "{{[fine.good, bad]}}", "late": "{{[good.upper(), bad]}}"}
    for name, choice in choices.items():
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
            f"    test: {tmp_path}/rows.jsonl\noutput_type: multiple_choice\ntest_split: test\n"
            f"doc_to_text: ''\ndoc_to_target: 0\ndoc_to_choice: '{choice}'\n"
            "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
        )
    names = ["misnamed", "late", "spectrim_tense"]
    found = zero_shot(model, words, names, limit=4, task_folders=[tmp_path])
    assert list(found.tasks) == ["spectrim_tense"]
    assert "task file of 'misnamed' does not fit its data" in found.skipped["misnamed"]
    assert "'fine' is undefined" in found.skipped["misnamed"]
    assert "'late' failed on its data" in found.skipped["late"]


@needs_lm_eval
def test_unknown_names_are_refused(model, words, monkeypatch):
    # lm-eval's own thousands of task files would take long to read.
    ours = zero_shot_module.task_manager(["spectrim_tense"], [zero_shot_module.TASK_FOLDER])
    monkeypatch.setattr(zero_shot_module, "task_manager", lambda *_: ours)
    with pytest.raises(InputError, match="'hellaswagg'"):
        zero_shot(model, words, ["spectrim_tense", "hellaswagg"])
    with pytest.raises(InputError, match="task folder /absent"):
        zero_shot(model, words, ["spectrim_tense"], task_folders=["/absent"])
    with pytest.raises(InputError, match="leaves no questions"):
        zero_shot(model, words, ["spectrim_tense"], limit=0)
    with pytest.raises(InputError, match="no tokenizer"):
        zero_shot(model, None, ["spectrim_tense"])


def test_sets_stand_for_their_members():
    assert task_names(["literature", "piqa"]) == list(LITERATURE_TASKS)
    assert task_names(["offline"]) == list(OFFLINE_TASKS)


@pytest.mark.parametrize("kind", sorted(pairs.KINDS))
def test_the_files_are_what_the_templates_give(kind):
    lines = (pairs.HERE / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
    found = [(row["good"], row["bad"]) for row in map(json.loads, lines)]
    assert found == pairs.sentences(kind)
    assert len(set(found)) == len(found) > 50
    goods, bads = {good for good, _ in found}, {bad for _, bad in found}
    assert not goods & bads
