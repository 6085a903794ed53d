"""The command line as a user meets it: every command, and every mistake as one sentence that leaves nothing behind."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import killing
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration
from zoo import build

from trsp_fast import cli
from trsp_fast.errors import Interrupted
from trsp_fast.models.checkpoint import load_model

QUICK = [
    "--set",
    "data.samples=8",
    "--set",
    "data.batch=4",
    "--set",
    "select.steps_per_round=1",
    "--set",
    "transfer.epochs=1",
]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["trsp-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "llama"
    tiny_llama(layers=5).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"tokens": torch.randint(0, 97, (40, 16), generator=torch.Generator().manual_seed(3))}, path)
    return path


def test_prune_writes_a_checkpoint_that_plain_transformers_loads(run, model, tokens, tmp_path):
    out = tmp_path / "out"
    code, text, _ = run("prune", model, "--num-layers", 2, "--data", tokens, "--out", out, *QUICK)
    assert code == 0
    pruned, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert pruned.config.num_hidden_layers == 3
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert "export proven" in text
    report = json.loads((out / "report.json").read_text())
    assert report["proven"]
    assert report["layers_after"] == 3
    assert report["data"] == str(tokens)
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    events = [json.loads(line)["event"] for line in (out / ".trsp" / "events.jsonl").read_text().splitlines()]
    assert events.count("select_step") == 2
    assert "transfer_step" in events
    assert json.loads((out / ".trsp" / "run.json").read_text())["config"]["num_layers"] == 2
    code, _, _ = run("verify", model, out, "--removed", ",".join(map(str, report["removed_layers"])))
    assert code == 0
    wrong = next(layer for layer in range(5) if layer not in report["removed_layers"])
    code, _, error = run("verify", model, out, "--removed", str(wrong))
    assert code == 1
    assert "not proven" in error


def test_prune_json_is_one_object_with_every_number(run, model, tokens, tmp_path):
    code, text, _ = run("prune", model, "--ratio", 0.2, "--data", tokens, "--out", tmp_path / "o", "--json", *QUICK)
    assert code == 0
    answer = json.loads(text)
    assert set(answer["perplexity"]) == {"dense", "cut", "transferred", "pruned"}
    assert answer["removed_layers"] == json.loads((tmp_path / "o" / "report.json").read_text())["removed_layers"]


def test_prune_without_stage_2_keeps_every_byte(run, model, tokens, tmp_path):
    out = tmp_path / "out"
    arguments = ("--layers", "1,3", "--set", "transfer.epochs=0")
    assert run("prune", model, "--data", tokens, "--out", out, *QUICK, *arguments)[0] == 0
    source, pruned = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    kept = [0, 2, 4]
    assert len(pruned) == len(source) - 2 * 9
    for name, tensor in pruned.items():
        old = name
        if name.startswith("model.layers."):
            index = int(name.split(".")[2])
            old = name.replace(f"layers.{index}.", f"layers.{kept[index]}.")
        assert torch.equal(tensor, source[old]), name


def test_remove_and_verify_real_model(run, stories_folder, tmp_path):
    out = tmp_path / "out"
    assert run("remove", stories_folder, "--layers", "2", "--out", out)[0] == 0
    assert (out / "tokenizer.json").exists()
    assert run("verify", stories_folder, out, "--removed", "2")[0] == 0
    assert run("verify", stories_folder, out, "--removed", "3")[0] == 1


@pytest.mark.parametrize("stated", ["bfloat16", "float32"])
def test_tensors_keep_their_own_dtype_whatever_the_configuration_says(run, tmp_path, stated):
    mixed = tiny_llama(layers=5)
    for name, parameter in mixed.named_parameters():
        if "norm" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    mixed.save_pretrained(tmp_path / "mixed")
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    (tmp_path / "mixed" / "config.json").write_text(json.dumps({**config, "dtype": stated}))
    assert run("remove", tmp_path / "mixed", "--layers", "4", "--out", tmp_path / "out")[0] == 0
    source, pruned = (load_file(tmp_path / name / "model.safetensors") for name in ("mixed", "out"))
    assert pruned["model.norm.weight"].dtype == torch.float32
    for name, tensor in pruned.items():
        assert tensor.dtype == source[name].dtype
        assert torch.equal(tensor, source[name])
    assert run("verify", tmp_path / "mixed", tmp_path / "out", "--removed", "4")[0] == 0


WRONG_KINDS = json.dumps(
    {"removed_layers": 3, "perplexity": {}, "speed": {}, "selection": {}, "transfer": [], "config": {}}
)


@pytest.mark.parametrize("content", ["{", "{}", "[]", WRONG_KINDS], ids=["cut off", "empty", "list", "wrong kinds"])
def test_a_broken_report_is_one_sentence(run, tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    code, _, error = run("report", tmp_path)
    assert (code, error.count("\n")) == (2, 1)


def test_a_truncated_checkpoint_is_one_sentence(run, model, tmp_path):
    shutil.copytree(model, tmp_path / "half")
    content = (model / "model.safetensors").read_bytes()
    (tmp_path / "half" / "model.safetensors").write_bytes(content[: len(content) // 2])
    code, _, error = run("remove", tmp_path / "half", "--layers", "2", "--out", tmp_path / "out")
    assert (code, error.count("\n")) == (2, 1)
    assert "model.safetensors" in error
    assert "data_offsets" in error


def test_select_takes_the_method_of_the_settings(run, model, tokens):
    code, text, _ = run("select", model, "--num-layers", 2, "--set", "select.method=last", "--data", tokens, "--json")
    assert code == 0
    assert json.loads(text)["method"] == "last"
    assert json.loads(text)["layers"] == [3, 4]


def test_prune_and_eval_real_text(run, stories_folder, stories_text, tmp_path):
    out = tmp_path / "out"
    code, text, error = run(
        "prune", stories_folder, "--num-layers", 1, "--data", stories_text, "--out", out, "--json", *QUICK
    )
    assert code == 0, error
    perplexity = json.loads(text)["perplexity"]
    assert 3 < perplexity["dense"] < 6
    assert perplexity["cut"] > perplexity["dense"]
    code, text, _ = run("eval", stories_folder, "--data", stories_text, "--json", "--seq-len", 256)
    assert code == 0
    assert json.loads(text)["perplexity"] == pytest.approx(4.67, abs=0.05)


@pytest.mark.parametrize("method", ["trsp", "shortgpt", "sleb", "angular", "shortened", "last", "first", "random"])
def test_select(run, model, tokens, method):
    code, text, _ = run("select", model, "--num-layers", 2, "--method", method, "--data", tokens, "--json", *QUICK[:6])
    assert code == 0
    assert len(json.loads(text)["layers"]) == 2


def test_report_is_written_again(run, model, tokens, tmp_path):
    out = tmp_path / "out"
    run("prune", model, "--layers", "1", "--data", tokens, "--out", out, *QUICK)
    before = (out / "report.html").read_text()
    (out / "report.html").unlink()
    assert run("report", out)[0] == 0
    assert (out / "report.html").read_text() == before


def test_quality_bound_stops_before_writing(run, model, tokens, tmp_path):
    bound = ("--set", "quality.max_perplexity_ratio=0.01")
    code, _, error = run("prune", model, "--num-layers", 1, "--data", tokens, "--out", tmp_path / "out", *QUICK, *bound)
    assert code == 1
    assert "quality.max_perplexity_ratio allows 0.01" in error
    assert not (tmp_path / "out").exists()


def bad_models(folder):
    """Folders that are wrong in one way each."""
    size = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "vocab_size": 50,
    }
    BertForMaskedLM(BertConfig(**size)).save_pretrained(folder / "bert")
    T5ForConditionalGeneration(
        T5Config(d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=2, vocab_size=9)
    ).save_pretrained(folder / "t5")
    broken = tiny_llama(layers=5)
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    broken.save_pretrained(folder / "nan")
    (folder / "empty").mkdir()


@pytest.fixture(scope="session")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    bad_models(folder)
    (folder / "empty.txt").write_text("  \n")
    (folder / "short.txt").write_text("a")
    (folder / "table.jsonl").write_text('{"words": 1}\n')
    (folder / "broken.jsonl").write_text("{nope\n")
    (folder / "unknown.yaml").write_text("transfer:\n  speed: 1\n")
    (folder / "wrong.yaml").write_text("transfer:\n  lr: quick\n")
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("")
    save_file({"tokens": torch.full((4, 16), 500)}, folder / "vocabulary.safetensors")
    save_file({"tokens": torch.zeros(4, 16)}, folder / "floats.safetensors")
    return folder


ROWS = {
    "no model": (["{bad}/none"], "model '{bad}/none' cannot be loaded"),
    "no config": (["{bad}/empty"], "has no config.json"),
    "not causal": (["{bad}/bert"], "BertForMaskedLM is not a causal language model"),
    "encoder-decoder": (["{bad}/t5"], "T5ForConditionalGeneration is an encoder-decoder"),
    "nan weights": (["{bad}/nan"], "weight model.layers.1.mlp.up_proj.weight has 1 values that are not finite"),
    "ratio and layers": (["--layers", "1"], "ratio and layers were both given"),
    "ratio 0": (["--ratio", "0"], "ratio is 0.0"),
    "ratio 1": (["--ratio", "1"], "ratio is 1.0"),
    "ratio -1": (["--ratio=-1"], "ratio is -1.0"),
    "ratio rounds to none": (["--ratio", "0.05"], "comes to none"),
    "ratio rounds to all": (["--ratio", "0.95"], "comes to all"),
    "ratio is text": (["--ratio", "many"], "ratio is 'many'; it must be a number"),
    "layer out of range": (["--no-ratio", "--layers", "9"], "layer 9 does not exist; this model has layers 0 to 4"),
    "layer repeated": (["--no-ratio", "--layers", "1,1"], "layer 1 is named 2 times"),
    "layers are text": (["--no-ratio", "--layers", "one"], "layers are 'one'"),
    "nothing to remove": (["--no-ratio"], "nothing says how much to remove"),
    "no data": (["--data", "{bad}/none.txt"], "does not exist"),
    "no text field": (["--data", "{bad}/floats.safetensors"], "needs an integer tensor tokens"),
    "foreign tokens": (["--data", "{bad}/vocabulary.safetensors"], "the data has token 500, the model knows 0 to 96"),
    "sequence longer than the context": (
        ["--set", "data.seq_len=65"],
        "data.seq_len is 65, longer than the model's context of 64",
    ),
    "windows shorter than the sequence": (
        ["--set", "data.seq_len=32"],
        "the data has windows of 16 tokens, 32 are wanted",
    ),
    "output not empty": (["--out", "{bad}/full"], "is not empty"),
    "output is a file": (["--out", "{bad}/full/file"], "is a file"),
    "output not writable": (["--out", "/proc/trsp/out"], "cannot be created"),
    "unknown field": (["--config", "{bad}/unknown.yaml"], "transfer.speed is not a field"),
    "wrong type": (["--config", "{bad}/wrong.yaml"], "transfer.lr is 'quick'; it must be a number"),
    "no configuration": (["--config", "{bad}/none.yaml"], "cannot be read"),
    "unknown setting": (["--set", "transfer.speed=1"], "transfer.speed is not a field"),
    "unknown preset": (["--preset", "best"], "preset is 'best'"),
    "no real device": (["--device", "meta"], "device 'meta' cannot be used"),
    "huge seed": (["--seed", "99999999999999999999999"], "seed is 99999999999999999999999; it must be between"),
    "ratio nan": (["--ratio", "nan"], "ratio is nan; it must be a finite number"),
    "output below missing folders": (["--out", "{bad}/full/file/a/b"], "cannot be created"),
    "unknown device": (["--device", "toaster"], "device 'toaster' cannot be used"),
    "unknown option": (["--fast"], "No such option"),
}


@pytest.mark.parametrize("row", ROWS)
def test_bad_input_is_one_sentence_and_leaves_nothing(run, model, tokens, bad, tmp_path, row):
    changes, message = ROWS[row]
    changes = [part.format(bad=bad) for part in changes]
    subject = changes.pop(0) if changes and changes[0].startswith(str(bad)) else model
    amount = [] if "--no-ratio" in changes else ["--ratio", "0.4"]
    changes = [part for part in changes if part != "--no-ratio"]
    arguments = [*amount, "--data", tokens, "--out", tmp_path / "out", *changes]
    code, _, error = run("prune", subject, *arguments)
    assert code == 2
    assert message.format(bad=bad) in error
    assert "Traceback" not in error
    assert error.count("\n") == 1
    assert error.startswith("trsp-fast: ")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty.txt", "is empty"),
        ("short.txt", "less than one window"),
        ("table.jsonl", "every row needs a field text or messages"),
        ("broken.jsonl", "cannot be read"),
        ("none.txt", "does not exist; give a path, or one of demo, wikitext2"),
    ],
)
def test_bad_text_is_one_sentence(run, stories_folder, bad, tmp_path, name, message):
    code, _, error = run("prune", stories_folder, "--num-layers", 1, "--data", bad / name, "--out", tmp_path / "out")
    assert (code, error.count("\n")) == (2, 1)
    assert message in error


def test_a_model_without_tokenizer_cannot_read_text(run, model, bad, tmp_path):
    code, _, error = run("prune", model, "--num-layers", 1, "--data", bad / "short.txt", "--out", tmp_path / "out")
    assert (code, error.count("\n")) == (2, 1)
    assert "no usable tokenizer" in error


def test_no_space_is_one_sentence(run, model, tokens, tmp_path, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    command = ("prune", model, "--num-layers", 1, "--data", tokens, "--out", tmp_path / "out", *QUICK)
    with monkeypatch.context() as patch:
        patch.setattr("trsp_fast.pruner.save_checkpoint", full)
        code, _, error = run(*command)
    assert code == 2
    assert "no space left" in error
    assert "what was done is kept, make room and give --resume" in error
    code, _, error = run(*command)
    assert code == 2
    assert "give --resume to go on with it or --restart to discard it" in error
    code, _, error = run(*command, "--seed", 1, "--resume")
    assert code == 2
    assert "the interrupted run had config.seed = 0, this one has 1" in error
    assert run(*command, "--resume", "--restart")[0] == 2
    assert run(*command, "--resume")[0] == 0
    assert os.listdir(tmp_path) == ["out"]
    assert not (tmp_path / "out" / ".trsp" / "state").exists()
    assert "is complete; there is nothing to resume" in run(*command, "--resume")[2]


def test_a_really_full_disk_leaves_nothing(run, stories_folder, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        code, _, error = run("remove", stories_folder, "--layers", "2", "--out", disk / "out")
        left = os.listdir(disk)
    finally:
        subprocess.run(["umount", disk], check=True)
    assert code == 2
    assert "no space left" in error
    assert left == []


@pytest.mark.parametrize(("wish", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_its_step_and_resume_goes_on(model, tokens, tmp_path, wish, exit_code):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "trsp_fast", "prune", model, "--num-layers", "1", "--data", tokens, "--out", out]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    command += ["--set", "transfer.epochs=2000"]
    process = subprocess.Popen(command, **options)
    record = killing.wait_for_a_step(process, out)
    process.send_signal(wish)
    _, error = process.communicate(timeout=60)
    assert process.returncode == exit_code
    assert error == "trsp-fast: interrupted; give the same command with --resume to go on.\n"
    assert os.listdir(tmp_path) == [".out.unfinished"]
    process = subprocess.Popen([*command, "--resume"], **options)
    for line in process.stdout:
        if "going on with step" in line:
            break
    second = subprocess.run([*command, "--resume"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert second.returncode == 2
    assert "another run is at work on" in second.stderr
    process.kill()
    process.communicate()
    lines = record.read_text().splitlines()
    events = [json.loads(line) for line in lines if line.endswith("}")]
    (index,) = (number for number, event in enumerate(events) if event["event"] == "resumed")
    done = [event["step"] for event in events[:index] if event["event"] == "transfer_step"]
    assert events[index]["step"] == len(done) > 0  # the step was finished and saved: nothing is repeated


def test_an_interrupted_run_that_has_saved_nothing_leaves_nothing(model, tokens, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "trsp_fast", "prune", model, "--num-layers", "1", "--data", tokens, "--out", out]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    time.sleep(1)  # it is still importing
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_an_import_swallows_ends_the_run_all_the_same(
    run, model, tokens, tmp_path, monkeypatch, number, code
):
    def swallows(*arguments, **options):
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            os.kill(os.getpid(), number)
            time.sleep(5)
        return load_model(*arguments, **options)

    monkeypatch.setattr("trsp_fast.models.checkpoint.load_model", swallows)
    out = tmp_path / "out"
    found = run("prune", model, "--num-layers", 1, "--data", tokens, "--out", out)
    assert found == (code, "", "trsp-fast: interrupted; nothing was written.\n")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("command", "end", "sentence"),
    [
        ("prune", SystemExit(143), "interrupted; nothing was written."),
        ("prune", Interrupted(143), "interrupted; give the same command with --resume to go on."),
        ("demo", Interrupted(143), "interrupted; the next demo begins anew."),  # it has no --resume
    ],
)
def test_an_end_by_sigterm_says_what_is_left(run, model, tokens, tmp_path, monkeypatch, command, end, sentence):
    def work(*_arguments, **_options):
        raise end

    monkeypatch.setattr("trsp_fast.cli.prune._prune", work)
    rest = (model, "--num-layers", 1, "--data", tokens) if command == "prune" else ()
    assert run(command, *rest, "--out", tmp_path / "out") == (143, "", f"trsp-fast: {sentence}\n")


def test_the_console_script_and_the_module_are_the_same():
    script = shutil.which("trsp-fast", path=os.path.dirname(sys.executable))
    assert script, "the console script is not installed beside the interpreter"
    texts = [
        subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout.replace(
            "python -m trsp_fast", "trsp-fast"
        )
        for command in ([script], [sys.executable, "-m", "trsp_fast"])
    ]
    for name in ("demo", "prune", "select", "plan", "remove", "verify", "eval", "report"):
        assert all(f" {name} " in text for text in texts)


def test_help_needs_neither_torch_nor_transformers():
    code = """
import sys
sys.argv = ["trsp-fast", "--help"]
from trsp_fast.cli import main
try:
    main()
except SystemExit:
    print({"torch", "transformers"} & set(sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("set()")


@pytest.fixture
def jamba(tmp_path):
    build("jamba").save_pretrained(tmp_path / "jamba")
    return tmp_path / "jamba"


def test_plan_says_what_can_go_and_why_not(run, model, jamba):
    code, out, _ = run("plan", model, "--set", "select.protect_last=1")
    assert code == 0
    assert "4 of 5 layers can be taken out one by one, on disk or in memory" in out
    assert "layer 4 stays: protected by the settings." in out
    code, out, _ = run("plan", model, "--set", "select.protect_first=1", "--json")
    assert json.loads(out)["removable"] == [1, 2, 3, 4]
    assert json.loads(out)["kept"] == {"0": "protected by the settings."}
    code, out, _ = run("plan", jamba, "--json")
    answer = json.loads(out)
    assert (code, answer["layers"], answer["removable"]) == (0, 8, [0, 7])
    assert "would follow no fixed period any more" in answer["kept"]["3"]
    assert run("plan", jamba, "--layers", "0,1,2,3")[0] == 0


def test_plan_with_data_says_what_a_run_would_take(run, model, tokens):
    command = ("plan", model, "--num-layers", 2, "--data", tokens, *QUICK)
    code, out, error = run(*command)
    assert code == 0, error
    assert "2 of 5 layers would go in about" in out
    assert "stage 1: 2 steps, 128 tokens, 4 windows in one pass" in out
    code, out, _ = run(*command, "--json", "--preset", "paper")
    forecast = json.loads(out)["forecast"]
    assert forecast["steps"] == {"stage 1": 2, "stage 2": 2}
    assert set(forecast["seconds"]) == {"evaluation", "stage 1", "stage 2", "speed and proof"}
    weights = sum(t.numel() * 4 for t in load_file(model / "model.safetensors").values())
    assert forecast["memory"]["weights"] == weights
    assert forecast["memory"]["stage 2"]["optimiser"] == 2 * weights
    assert forecast["disk"]["states"] == 3 * 3 * weights  # weights and two moments, in two states and the next one
    code, _, error = run("plan", model, "--data", tokens)
    assert (code, error.count("\n")) == (2, 1)
    assert "--data was given without an amount" in error
    code, _, error = run("plan", model, "--num-layers", 3, "--set", "select.protect_first=3")
    assert (code, error.count("\n")) == (2, 1)
    assert "3 layers are to go, but only 2 of 5 can" in error


@pytest.mark.parametrize("command", ["plan", "remove"])
def test_an_off_period_cut_of_jamba_is_one_sentence(run, jamba, tmp_path, command):
    code, _, error = run(command, jamba, "--layers", "3", *(["--out", tmp_path / "out"] if command == "remove" else []))
    assert (code, error.count("\n")) == (2, 1)
    assert "remove whole periods of 4 layers" in error or "remove whole periods of 2 layers" in error
    assert not (tmp_path / "out").exists()


def spoiled(folder, kind, model):
    """A folder of the kind that is refused."""
    if kind in ("bert", "t5"):
        bad_models(folder)
        return folder / kind
    shutil.copytree(model, folder / kind)
    config = json.loads((model / "config.json").read_text())
    if kind == "adapter":
        (folder / kind / "adapter_config.json").write_text("{}")
    elif kind == "own code":
        (folder / kind / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "own.Config"}}))
    elif kind == "quantised":
        method = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
        (folder / kind / "config.json").write_text(json.dumps(config | method))
    return folder / kind


REFUSED = {
    "encoder": ("bert", "1", "BertForMaskedLM is not a causal language model"),
    "encoder-decoder": ("t5", "1", "T5ForConditionalGeneration is an encoder-decoder"),
    "quantised weights": ("quantised", "1", "prune the unquantised model and quantise the result"),
    "adapter": ("adapter", "1", "is a PEFT adapter; merge it"),
    "own code": ("own code", "1", "--allow-remote-code"),
    "layer out of range": ("whole", "5", "layer 5 does not exist; this model has layers 0 to 4"),
    "negative layer": ("whole", "-1", "layer -1 does not exist"),
    "layer repeated": ("whole", "2,2", "layer 2 is named 2 times"),
    "every layer": ("whole", "0,1,2,3,4", "5 of 5"),
}


@pytest.mark.parametrize("command", ["plan", "remove", "prune", "verify"])
@pytest.mark.parametrize("row", REFUSED)
def test_what_is_refused_is_one_sentence_in_every_command(run, model, tokens, tmp_path, capsys, row, command):
    kind, layers, message = REFUSED[row]
    subject = spoiled(tmp_path, kind, model)
    capsys.readouterr()
    options = {
        "plan": [f"--layers={layers}"],
        "remove": [f"--layers={layers}", "--out", tmp_path / "out"],
        "prune": [f"--layers={layers}", "--data", tokens, "--out", tmp_path / "out"],
        "verify": [subject, f"--removed={layers}"],
    }
    code, _, error = run(command, subject, *options[command])
    assert (code, error.count("\n")) == (2, 1), error
    assert error.startswith("trsp-fast: ")
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["remove", "prune", "verify"])
def test_no_layer_at_all_is_one_sentence(run, model, tokens, tmp_path, command):
    options = {
        "remove": ["--layers", "", "--out", tmp_path / "out"],
        "prune": ["--layers", "", "--data", tokens, "--out", tmp_path / "out"],
        "verify": [model, "--removed", ""],
    }
    code, _, error = run(command, model, *options[command])
    assert (code, error.count("\n")) == (2, 1), error
    assert "no layers were named" in error


@pytest.mark.parametrize("way", ["--streaming", "--in-memory"])
def test_verify_either_way(run, model, tmp_path, way):
    assert run("remove", model, "--layers", "1,3", "--out", tmp_path / "out")[0] == 0
    code, text, _ = run("verify", model, tmp_path / "out", "--removed", "1,3", "--json", way)
    answer = json.loads(text)
    assert (code, answer["passed"], answer["streaming"]) == (0, True, way == "--streaming")
    code, _, error = run("verify", model, tmp_path / "out", "--removed", "1,2", way)
    assert (code, error.count("\n")) == (1, 1)
    assert "not proven" in error


def test_verify_streams_where_memory_is_short(run, model, tmp_path, monkeypatch):
    run("remove", model, "--layers", "1,3", "--out", tmp_path / "out")
    assert "layer by layer" not in run("verify", model, tmp_path / "out", "--removed", "1,3")[2]
    monkeypatch.setattr("trsp_fast.models.streamed_verify.free_memory", lambda: 100_000)
    code, _, error = run("verify", model, tmp_path / "out", "--removed", "1,3")
    assert code == 0
    assert "read layer by layer" in error


def test_plan_refuses_what_cannot_be_pruned(run, tmp_path):
    build("rwkv").config.save_pretrained(tmp_path)
    code, _, error = run("plan", tmp_path)
    assert (code, error.count("\n")) == (2, 1)


def test_per_layer_embeddings_are_cut_in_memory(run, tmp_path):
    build("gemma3n").save_pretrained(tmp_path / "src")
    code, out, error = run("remove", tmp_path / "src", "--layers", "1,6", "--out", tmp_path / "out")
    assert code == 0, error
    assert "loaded and cut in memory" in error
    assert "proven" in out
    assert run("verify", tmp_path / "src", tmp_path / "out", "--removed", "1,6")[0] == 0


def test_a_model_of_two_dtypes_is_cut_in_memory(run, tmp_path):
    """As it is stored, it does not run: the proof casts it, the result keeps its dtypes."""
    build("gemma4").bfloat16().save_pretrained(tmp_path / "src")
    path = tmp_path / "src" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # the file is overwritten below
    wide = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {wide: tensors[wide].float()}, path, {"format": "pt"})
    code, out, error = run("remove", tmp_path / "src", "--layers", "1", "--out", tmp_path / "out")
    assert code == 0, error
    assert "proven" in out
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert {name for name, tensor in kept.items() if tensor.dtype == torch.float32} == {wide}
