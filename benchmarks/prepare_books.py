"""Rebuild the books text of the benchmarks: 45 novels to train on, three that the model never saw.

    python benchmarks/prepare_books.py books            # download, clean, compare
    python benchmarks/prepare_books.py books --tokenizer

writes `books_train.txt` (the cleaned novels in the order of their names, a blank line between two),
`books_eval.txt` (Emma, the evaluation text) and `books_heldout.txt` (Emma, Lord Jim and Treasure
Island, what training watches), prints their SHA-256 and compares them with the recorded ones.
`--tokenizer` also trains the byte-level BPE of 4096 tokens on the training text.

Where the list comes from. The list that the text was first built from was not kept beside it. The
45 titles were read off the finished text, which still shows its seams, by their opening and
closing lines. The names of the held-out books that did survive (`Emma_158`) are in the style of
GITenberg, a mirror of Project Gutenberg with one repository per book, and the sorted GITenberg
names of the 45 titles give exactly the order of the text; the names and numbers are therefore
GITenberg's. They were not confirmed by a download when the list was made. The fingerprints were
computed from the finished text, so a wrong number, or an edition that was corrected since, is
reported by the name of the book. Project Gutenberg's own site (`--mirror
https://www.gutenberg.org/files/{number}/{file}`) serves later editions with new headers; expect
most of them to differ in a few lines, which no measurement notices.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

__all__ = ["clean", "fetch", "fingerprint", "main", "train_tokenizer"]

MIRROR = "https://raw.githubusercontent.com/GITenberg/{name}/master/{file}"
SUFFIXES = ("-0.txt", ".txt", "-8.txt")  # UTF-8, ASCII, Latin-1: a book has at least one of them

# name_number -> first 16 hex digits of the cleaned book's SHA-256, None where it is not recorded
TRAIN: dict[str, str | None] = {
    "A-Tale-of-Two-Cities_98": "f0c155bb9ad52743",
    "Adam-Bede_507": "82eca6a738e75f6b",
    "Adventures-of-Huckleberry-Finn_76": "66f857ef581bd3e6",
    "Anna-Karenina_1399": "32b55413d14b5a70",
    "Barchester-Towers_3409": "0658d467dada6c17",
    "Bleak-House_1023": "a3b8d367ea1433ad",
    "Crime-and-Punishment_2554": "a801a02af0b56a83",
    "David-Copperfield_766": "39f717a7a19811b3",
    "Dombey-and-Son_821": "2781fd04c2b1a55f",
    "Don-Quixote_996": "be339ff6b95c473d",
    "Dracula_345": "b617b2a790b5c4a4",
    "Far-from-the-Madding-Crowd_27": "5570f8e732b915bc",
    "Great-Expectations_1400": "bac0a833c3de5894",
    "Jane-Eyre_1260": "c05a73f53ce08d8a",
    "Les-Mis-rables_135": "a1ca378c8884695e",
    "Little-Dorrit_963": "4ef0cdfe1216136a",
    "Little-Women_514": "264719cb2c24f781",
    "Mansfield-Park_141": "9871f144f8e8377b",
    "Martin-Chuzzlewit_968": "2c76f12158840243",
    "Middlemarch_145": "96c00dca59df77e6",
    "Moby-Dick--Or-The-Whale_2701": "71f772f0b3fd1b98",
    "Nicholas-Nickleby_967": "eddea31ff1b4a406",
    "Nostromo--A-Tale-of-the-Seaboard_2021": "40610374ea9a01fc",
    "Oliver-Twist_730": "5f62507f95f82ac0",
    "Our-Mutual-Friend_883": "616f854733ce0cbc",
    "Persuasion_105": "1308c9541f6ea15f",
    "Pride-and-Prejudice_1342": "13b731427d0ddb2a",
    "Sense-and-Sensibility_161": "2b7dd61269be2337",
    "The-Adventures-of-Sherlock-Holmes_1661": "cccd81bbe4a074ad",
    "The-Adventures-of-Tom-Sawyer_74": "7eeb616bf843f354",
    "The-Brothers-Karamazov_28054": "b6c203309fb1dfd6",
    "The-Idiot_2638": "cb59fcc966cc0599",
    "The-Mill-on-the-Floss_6688": "bc23cc0306b7783a",
    "The-Moonstone_155": "a418ec729655d809",
    "The-Mysterious-Island_1268": "25ac0d3b7c7ccfd1",
    "The-Old-Curiosity-Shop_700": "257058f859191ae0",
    "The-Pickwick-Papers_580": "ebec647abc267c36",
    "The-Three-Musketeers_1257": "8e950038a7021a8c",
    "The-Way-We-Live-Now_5231": "49660d6bb89b54c8",
    "The-Woman-in-White_583": "a8eef4ac8d778b26",
    "Twenty-Years-After_1259": "69bd8a45771a2871",
    "Ulysses_4300": "d94a8be15d3690a8",
    "Vanity-Fair_599": "0c48a6ced035065b",
    "War-and-Peace_2600": "2de6c5c723e93064",
    "Wuthering-Heights_768": "1fb2d67b786cae66",
}
HELD_OUT: dict[str, str | None] = {
    "Emma_158": "2d0ad636b78958ad",
    "Lord-Jim_5658": None,
    "Treasure-Island_120": None,
}
EVALUATION = "Emma_158"
EXPECTED = {
    "books_train.txt": "db903386f2027aa595d2ba2b39e079c0c04c9ecba8b2e8f481350a6d149be383",
    "books_eval.txt": "2d0ad636b78958ad01dcffbc4fea456f34268c0db5f95f7d1a5a7d32cece126d",
}

BEGINS = re.compile(r"\*\*\* ?START OF (?:THIS|THE) PROJECT GUTENBERG.*?\*\*\*", re.DOTALL)
ENDS = re.compile(r"\*\*\* ?END OF (?:THIS|THE) PROJECT GUTENBERG")
PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "_": None})
SHORTEST = 40  # characters; shorter paragraphs that are not speech are headings and page furniture


def clean(raw: bytes) -> str:
    r"""One paragraph a line: no license, plain quotes and dashes, no headings.

    Args:
        raw: a Project Gutenberg text file, UTF-8 or Latin-1.

    Returns:
        Paragraphs longer than 40 characters or opening with a quotation mark, each ended by `\n`.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    text = text.replace("\r\n", "\n")
    if begin := BEGINS.search(text):
        text = text[begin.end() :]
    if end := ENDS.search(text):
        text = text[: end.start()]
    text = text.translate(PLAIN)
    paragraphs = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    kept = [p for p in paragraphs if len(p) > SHORTEST or p.startswith('"')]
    return "\n".join(kept) + "\n"


def fingerprint(text: str) -> str:
    """SHA-256 of the UTF-8 bytes, in hex."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


class HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Refuses a redirect that would leave https."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        """The redirected request, or an error for any other scheme."""
        if not newurl.startswith("https://"):
            raise urllib.error.URLError(f"{req.full_url} redirects away from https, to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url: str) -> bytes | None:
    """The bytes behind an https address, None where the server has no such file."""
    if not url.startswith("https://"):
        raise ValueError(f"only https is downloaded, found {url!r}")
    request = urllib.request.Request(  # noqa: S310 -- the scheme is checked above
        url, headers={"User-Agent": "spectrim-prepare-books/0.1"}
    )
    try:
        with urllib.request.build_opener(HttpsOnly).open(request, timeout=60) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def fetch(name: str, expected: str | None, *, mirror: str, folder: Path, pause: float) -> str:
    """The cleaned book, from `folder` if an earlier run has put it there.

    Of the files that the mirror holds for a book, the one whose cleaned text has the expected
    fingerprint is taken, else the first.
    """
    number = name.rsplit("_", 1)[1]
    candidates: list[str] = []
    for suffix in SUFFIXES:
        path = folder / f"{name}{suffix}"
        if not path.exists():
            raw = download(mirror.format(name=name, number=number, file=number + suffix))
            time.sleep(pause)
            if raw is None:
                continue
            path.write_bytes(raw)
        candidates.append(clean(path.read_bytes()))
        if expected is None or fingerprint(candidates[-1]).startswith(expected):
            return candidates[-1]
    if not candidates:
        raise FileNotFoundError(f"{name}: the mirror has none of {', '.join(SUFFIXES)} for it")
    print(f"  {name}: differs from the recorded edition ({expected})", file=sys.stderr)
    return candidates[0]


def train_tokenizer(books: Iterable[str]) -> Tokenizer:
    """Byte-level BPE of 4096 tokens; `<|endoftext|>` is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(books, trainer)
    return tokenizer


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rebuild the books text of the benchmarks.")
    parser.add_argument("out", type=Path, help="folder for the texts")
    parser.add_argument(
        "--mirror", default=MIRROR, help="https address with {name}, {number} and {file} to fill in"
    )
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two downloads")
    parser.add_argument("--tokenizer", action="store_true", help="also train tokenizer.json")
    options = parser.parse_args(arguments)

    raw = options.out / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    books: dict[str, str] = {}
    for name, expected in sorted((TRAIN | HELD_OUT).items()):
        print(name, flush=True)
        books[name] = fetch(name, expected, mirror=options.mirror, folder=raw, pause=options.pause)

    texts = {
        "books_train.txt": "\n".join(books[name] for name in sorted(TRAIN)),
        "books_heldout.txt": "\n".join(books[name] for name in sorted(HELD_OUT)),
        "books_eval.txt": books[EVALUATION],
    }
    identical = True
    for file, text in texts.items():
        (options.out / file).write_text(text, encoding="utf-8", newline="\n")
        found, recorded = fingerprint(text), EXPECTED.get(file)
        verdict = "not recorded" if recorded is None else "same" if found == recorded else "DIFFERS"
        identical &= verdict != "DIFFERS"
        print(f"{found}  {file}  {len(text)} characters  {verdict}")
    if options.tokenizer:
        tokenizer = train_tokenizer(books[name] for name in sorted(TRAIN))
        tokenizer.save(str(options.out / "tokenizer.json"))
        print(f"tokenizer.json  {tokenizer.get_vocab_size()} tokens")
    return 0 if identical else 1


if __name__ == "__main__":
    raise SystemExit(main())
