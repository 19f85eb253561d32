"""transformers' Trainer on a compressed model: it trains, saves, and what it saved loads."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from architectures import windows
from jobs import logits
from spectrim.layers.swap import compressed_layers
from storage_cases import compressed

IDS = windows(16, 12, vocab_size=12)


class Windows(Dataset):
    def __len__(self):
        return len(IDS)

    def __getitem__(self, index):
        return {"input_ids": IDS[index], "labels": IDS[index]}


@pytest.mark.parametrize("kind", ["factored", "packed"])
def test_the_trainer_moves_the_factors_and_saves_a_result(kind, tmp_path):
    model = compressed(kinds=(kind,))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "runs"),
        max_steps=8,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Windows())
    start = model(input_ids=IDS, labels=IDS).loss
    trainer.train()
    assert model.eval()(input_ids=IDS, labels=IDS).loss < start
    layers = compressed_layers(model)
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert layers and not [name for name in still if name.startswith(tuple(layers))]
    trainer.save_model(str(tmp_path / "tuned"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").eval()
    assert compressed_layers(again).keys() == layers.keys()
    torch.testing.assert_close(logits(again, IDS), logits(model, IDS))
