"""Compress a model, and load the result as any other model.

python examples/compress_and_load.py [MODEL [TEXT.txt [OUT]]]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import spectrim
from spectrim.demo.run import CALIBRATION, MODEL


def main(model=MODEL, text=CALIBRATION, output="compressed", **options):
    """Keep six tenths of the bytes; `options` are further words of `spectrim.compress`."""
    result = spectrim.compress(model, keep=0.6, text=text, output=output, **options)
    bytes_of = result.report["keep"]["model_bytes"]
    print(f"{bytes_of['dense']} bytes before, {bytes_of['stored']} after: {result.output}")

    # Importing spectrim was enough: transformers reads the folder from now on.
    tokenizer = AutoTokenizer.from_pretrained(output)
    small = AutoModelForCausalLM.from_pretrained(output)
    prompt = tokenizer("The old house stood", return_tensors="pt")
    written = small.generate(**prompt, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(written[0]))
    return small


if __name__ == "__main__":
    main(*sys.argv[1:])
