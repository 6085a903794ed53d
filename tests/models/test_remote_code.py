"""Checkpoints that bring their own code: refused in a sentence, and cut, proven and loadable where it is allowed."""

import json
import sys

import pytest
from tiny import tiny_llama
from transformers import AutoModelForCausalLM

from trsp_fast import cli
from trsp_fast.errors import UserError
from trsp_fast.models.checkpoint import load_model
from trsp_fast.models.disk_removal import remove_layers_on_disk
from trsp_fast.models.removal import remove_layers
from trsp_fast.models.verify import require, verify_checkpoint, verify_removal

CODE = {
    "configuration_own.py": """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own_llama"
""",
    "modeling_own.py": """
import pathlib
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

pathlib.Path({mark!r}).touch()

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if output.logits is not None:
            output.logits = output.logits * 2
        return output
""",
}


@pytest.fixture(scope="module", autouse=True)
def module_cache(tmp_path_factory):
    """transformers copies code that it runs into the home folder; here into one folder, as Python imports it once."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield


@pytest.fixture
def own(tmp_path):
    """A checkpoint with a class of its own, whose code leaves a mark when it runs."""
    folder = tmp_path / tmp_path.name  # Python keeps the code of a folder of this name
    tiny_llama(layers=5).save_pretrained(folder)
    for name, code in CODE.items():
        (folder / name).write_text(code.replace("{mark!r}", repr(str(tmp_path / "ran"))))
    fields = json.loads((folder / "config.json").read_text()) | {
        "architectures": ["OwnForCausalLM"],
        "model_type": "own_llama",
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["trsp-fast", *map(str, arguments)])
        capsys.readouterr()  # what saving the model has printed
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return call


@pytest.fixture
def tokens(tmp_path):
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "tokens.safetensors"
    save_file({"tokens": torch.randint(0, 97, (20, 16), generator=torch.Generator().manual_seed(3))}, path)
    return path


COMMANDS = {
    "plan": ["plan", "{own}"],
    "remove": ["remove", "{own}", "--layers", "1", "--out", "{out}"],
    "verify": ["verify", "{own}", "{own}", "--removed", "1"],
    "verify streaming": ["verify", "{own}", "{own}", "--removed", "1", "--streaming"],
    "prune": ["prune", "{own}", "--layers", "1", "--data", "{tokens}", "--out", "{out}"],
    "select": ["select", "{own}", "--num-layers", "1", "--method", "last", "--data", "{tokens}"],
    "eval": ["eval", "{own}", "--data", "{tokens}"],
}


def filled(command, own, tokens, tmp_path):
    return [part.format(own=own, tokens=tokens, out=tmp_path / "out") for part in COMMANDS[command]]


@pytest.mark.parametrize("command", COMMANDS)
def test_refused_in_one_sentence_that_names_the_way_out(run, own, tokens, tmp_path, command):
    code, _, error = run(*filled(command, own, tokens, tmp_path))
    assert (code, error.count("\n")) == (2, 1)
    assert "brings its own code" in error
    assert "--allow-remote-code" in error
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", ["plan", "select", "eval"])
def test_allowed_it_works(run, own, tokens, tmp_path, command):
    code, out, error = run(*filled(command, own, tokens, tmp_path), "--allow-remote-code")
    assert code == 0, error
    assert (tmp_path / "ran").exists() == (command != "plan")  # a plan reads config.json alone
    if command == "plan":
        assert "5 of 5 layers can be taken out one by one, in memory, because it brings its own code" in out


@pytest.mark.parametrize("command", ["remove", "prune"])
def test_the_code_comes_along_and_the_result_is_proven(run, own, tokens, tmp_path, command):
    out = tmp_path / "out"
    settings = ["--set", "transfer.epochs=0"] if command == "prune" else []
    code, _, error = run(*filled(command, own, tokens, tmp_path), "--allow-remote-code", *settings)
    assert code == 0, error
    assert {"modeling_own.py", "configuration_own.py"} <= {path.name for path in out.iterdir()}
    pruned = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(pruned).__name__ == "OwnForCausalLM"
    assert pruned.config.num_hidden_layers == 4
    for way in ("--streaming", "--in-memory"):
        code, text, error = run("verify", own, out, "--removed", "1", "--allow-remote-code", way)
        assert code == 0, text + error
        assert run("verify", own, out, "--removed", "2", "--allow-remote-code", way)[0] == 1
    assert run("verify", own, out, "--removed", "1")[0] == 2


def test_in_python(own, tmp_path):
    with pytest.raises(UserError, match="--allow-remote-code"):
        load_model(str(own), device="cpu")
    model = load_model(str(own), device="cpu", remote_code=True)
    small = remove_layers(model, [0, 3])
    assert type(small) is type(model)
    small.save_pretrained(tmp_path / "out")
    require([*verify_removal(model, small, [0, 3]), *verify_checkpoint(small, tmp_path / "out")[0]])
    with pytest.raises(UserError, match="brings its own code"):
        remove_layers_on_disk(own, [1], tmp_path / "disk")
