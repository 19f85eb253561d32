"""The three corpora that the low-rank literature calibrates and measures on, by name.

They are fetched through the optional package `datasets` at pinned revisions. Calibration reads the
training part, evaluation the test part; C4 has no test part, so its first validation shard stands
in, cut to its first 2,000 documents as in the harness of SVD-LLM (arXiv 2403.07378).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from spectrim.errors import MissingExtraError, TextError


@dataclass(frozen=True)
class Corpus:
    """Where a corpus lies on the Hugging Face Hub.

    Attributes:
        repository: dataset id.
        configuration: configuration name, or None.
        revision: git revision, pinned so that the same name is the same text next year.
        field: the column that holds the text.
        splits: part of the run -> split of the dataset.
        files: part of the run -> file inside the repository, or None to read whole splits.
        documents: part of the run -> largest number of documents, None for all.
    """

    repository: str
    configuration: str | None
    revision: str
    field: str
    splits: dict[str, str]
    files: dict[str, str] | None
    documents: dict[str, int | None]


CORPORA: dict[str, Corpus] = {
    "wikitext2": Corpus(
        repository="Salesforce/wikitext",
        configuration="wikitext-2-raw-v1",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        field="text",
        splits={"calibration": "train", "evaluation": "test"},
        files=None,
        documents={"calibration": None, "evaluation": None},
    ),
    "c4": Corpus(
        repository="allenai/c4",
        configuration=None,
        revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        field="text",
        splits={"calibration": "train", "evaluation": "validation"},
        files={
            "calibration": "en/c4-train.00000-of-01024.json.gz",
            "evaluation": "en/c4-validation.00000-of-00008.json.gz",
        },
        # One training shard is 0.8 GB of text; 20,000 documents are some 40 MB, 10 million tokens.
        documents={"calibration": 20_000, "evaluation": 2_000},
    ),
    "ptb": Corpus(
        repository="ptb-text-only/ptb_text_only",
        configuration="penn_treebank",
        # The repository itself is a loading script, which `datasets` no longer runs.
        revision="refs/convert/parquet",
        field="sentence",
        splits={"calibration": "train", "evaluation": "test"},
        files=None,
        documents={"calibration": None, "evaluation": None},
    ),
}


def load_corpus(name: str, part: Literal["calibration", "evaluation"]) -> list[str]:
    """The documents of one part of a corpus, in their published order.

    Raises:
        MissingExtraError: the package `datasets` is not installed.
        TextError: the corpus is neither cached nor reachable; says how to give it locally.
    """
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise MissingExtraError("datasets", "text", f"the text source {name!r}") from error
    corpus = CORPORA[name]
    split = corpus.splits[part]
    options: dict[str, Any] = {"revision": corpus.revision, "split": split}
    if corpus.files is not None:
        # One shard of many: the repository's own row counts cannot match, the revision does.
        options |= {"data_files": {split: corpus.files[part]}, "verification_mode": "no_checks"}
    try:
        rows = load_dataset(corpus.repository, corpus.configuration, **options)
    except (OSError, ValueError, DatasetsError) as error:
        # Network, cache and Hub failures arrive as all three, depending on the version.
        raise TextError(
            f"the text source {name!r} needs the dataset {corpus.repository!r} (split {split}, "
            f"revision {corpus.revision}), which is neither cached nor reachable: {error}; "
            f"download it elsewhere and give it as a local .txt or .jsonl file instead"
        ) from error
    return [row[corpus.field] for row in islice(rows, corpus.documents[part])]
