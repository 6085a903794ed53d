"""Prune a model of your own from Python: load, choose, transfer, remove, prove, save, use.

python examples/prune_local_model.py MODEL_FOLDER TEXT_FILE OUT_FOLDER [--num-layers 1]
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import trsp_fast as trsp
from trsp_fast.data import calibration_windows, evaluation_windows, load_streams, window_length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("out")
    parser.add_argument("--num-layers", type=int, default=1)
    parser.add_argument("--samples", type=int, default=128)
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    length = window_length(model.config, 0)
    streams = load_streams(arguments.text, tokenizer)
    tokens = calibration_windows(streams.calibration, arguments.samples, length, seed=0)
    evaluation = evaluation_windows(streams.evaluation, min(length, len(streams.evaluation)), most=64)

    config = trsp.TRSPConfig(num_layers=arguments.num_layers)
    result = trsp.prune(model, tokens, config, out=arguments.out, evaluation=evaluation, tokenizer=tokenizer)
    print(f"removed layers {result.removed_layers}")
    for name, value in result.perplexity.items():
        print(f"perplexity, {name}: {value:.2f}")

    pruned = AutoModelForCausalLM.from_pretrained(arguments.out)
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    print(tokenizer.decode(pruned.generate(**prompt, max_new_tokens=20, do_sample=False)[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
