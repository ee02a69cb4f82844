"""The command line: every command, its exit code, and no traceback for a user's mistake."""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml

from helpers.pretrained import MODELS, narrow
from lightning_optim import Recipe, load_from_checkpoint, student_only
from lightning_optim.callbacks.weight_pruning import WeightPruning
from lightning_optim.cli import main
from lightning_optim.cli.main import COMMANDS
from lightning_optim.demo import DigitsData, DigitsNet
from lightning_optim.export.session import ExportedModel
from lightning_optim.provenance import _versions

MODEL = ["--model", "lightning_optim.demo.DigitsNet"]
DATA = ["--data", "lightning_optim.demo.DigitsData"]
TRAINER = {
    "accelerator": "cpu",
    "max_epochs": 2,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_train_batches": 8,
    "callbacks": [
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"save_on_train_epoch_end": True, "enable_version_counter": False},
        }
    ],
}
RECIPE = {
    "channel_pruning": {"pruning_ratio": 0.5, "events": 2},
    "weight_pruning": {"sparsity": 0.5, "every_n_steps": 2},
    "quantization": True,
}


@pytest.fixture(autouse=True)
def _lightning_calls_what_jsonargparse_deprecates(monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


def config(folder: Path, name: str, width: int, **words) -> Path:
    """Write a configuration whose checkpoint is ``folder/name/name.ckpt``."""
    trainer = json.loads(json.dumps(TRAINER))
    trainer["callbacks"][0]["init_args"] |= {"dirpath": str(folder / name), "filename": name}
    content = {
        "seed_everything": 3,
        "model": {"class_path": "lightning_optim.demo.DigitsNet", "init_args": {"width": width}},
        "data": {"class_path": "lightning_optim.demo.DigitsData", "init_args": {"seed": 3}},
        "trainer": trainer,
        **words,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher, a student that it taught by all techniques at once, and their configurations."""
    folder = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    patch.chdir(folder)
    teacher = config(folder, "teacher", 10)
    assert main(["fit", "--config", str(teacher)]) == 0
    words = {"class_path": "lightning_optim.demo.DigitsNet", "init_args": {"width": 10}}
    student = config(
        folder,
        "student",
        6,
        recipe={**RECIPE, "distillation": {"alpha": 0.5}},
        teacher=words,
        teacher_ckpt=str(folder / "teacher" / "teacher.ckpt"),
    )
    assert main(["fit", "--config", str(student)]) == 0
    patch.undo()
    return folder


def test_fit_by_a_recipe_and_a_teacher(runs):
    file = torch.load(runs / "student" / "student.ckpt", weights_only=True)
    assert file["distillation"]["asked"]["teacher"] == ["DigitsNet"]
    model = load_from_checkpoint(DigitsNet, student_only(runs / "student" / "student.ckpt", runs / "alone.ckpt"))
    assert sum(p.numel() for p in model.parameters()) < 0.6 * sum(p.numel() for p in DigitsNet(6).parameters())
    assert model.net[0].quantization_phase == "frozen"
    assert model.eval()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_the_same_run_in_python_gives_the_same_weights(runs, tmp_path):
    teacher = load_from_checkpoint(DigitsNet, runs / "teacher" / "teacher.ckpt")
    pl.seed_everything(3, verbose=False)
    student = DigitsNet(6)
    recipe = Recipe(**RECIPE, distillation={"alpha": 0.5})
    words = {name: value for name, value in TRAINER.items() if name != "callbacks"}
    trainer = pl.Trainer(**words, enable_checkpointing=False, callbacks=recipe.callbacks(), default_root_dir=tmp_path)
    trainer.fit(recipe.wrap(student, teacher), datamodule=DigitsData(seed=3))
    from_yaml = torch.load(runs / "student" / "student.ckpt", weights_only=True)["state_dict"]
    for name, value in student.state_dict().items():
        assert torch.equal(value, from_yaml[f"student.{name}"]), name


def test_a_name_and_a_file_are_recipes_too(runs, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("weight_pruning: 0.5\n")
    for name, recipe in (("file", "mine.yaml"), ("name", "small-file")):
        path = config(tmp_path, name, 6, recipe=recipe)
        assert main(["fit", "--config", str(path), "--trainer.max_epochs", "1"]) == 0
        file = torch.load(tmp_path / name / f"{name}.ckpt", weights_only=True)
        assert any(key.startswith("WeightPruning") for key in file["callbacks"])


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_compressed_file_is_validated_and_tested(runs, command, capsys):
    path = str(runs / "student.yaml")
    assert main([command, "--config", path, "--ckpt_path", str(runs / "student" / "student.ckpt")]) == 0
    assert {"validate": "val_acc", "test": "test_acc"}[command] in capsys.readouterr().out


def test_predict(runs):
    arguments = [
        "predict",
        "--config",
        str(runs / "student.yaml"),
        "--ckpt_path",
        str(runs / "student" / "student.ckpt"),
    ]
    assert main(arguments) == 0


def test_show(runs, capsys):
    assert main(["show", str(runs / "student" / "student.ckpt")]) == 0
    shown = capsys.readouterr().out
    for text in (
        "lightning_optim.demo.DigitsNet",
        "scikit-learn's digits, 958 samples",
        "channel_pruning",
        "pruning_ratio: 0.5",
        "WeightPruning",
        "asked",
        "reached",
        "QuantizationAwareTraining",
        "frozen",
        "val_acc",
        "{kd: 1.0}",
        torch.__version__,
    ):
        assert text in shown, text


def test_show_a_file_of_plain_lightning(runs, tmp_path, capsys):
    assert main(["show", str(runs / "teacher" / "teacher.ckpt")]) == 0
    assert "written without lightning_optim" in capsys.readouterr().out


def test_export(runs, tmp_path, capsys):
    arguments = ["export", str(runs / "student" / "student.ckpt"), str(tmp_path / "net.onnx")]
    assert main([*arguments, "--config", str(runs / "student.yaml")]) == 0
    assert "Verified in onnxruntime" in capsys.readouterr().out
    assert main([*arguments, "--config", str(runs / "student.yaml"), "--target", "tensorrt"]) == 1
    assert 'Quantize with activation_ranges="symmetric"' in capsys.readouterr().err
    images = DigitsData().splits["test"][:50][0]
    model = load_from_checkpoint(DigitsNet, student_only(runs / "student" / "student.ckpt", tmp_path / "alone.ckpt"))
    answer = ExportedModel(tmp_path / "net.onnx")(images)  # a plain session errs on processors without VNNI
    with torch.no_grad():
        assert (answer.argmax(1) == model.eval()(images).argmax(1)).float().mean() > 0.95


class CausalModel(pl.LightningModule):
    """A small Llama, without data."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = MODELS["Llama"].make()
        for block in self.net.model.layers:
            narrow(block.mlp, width)


def test_export_of_a_hugging_face_folder(tmp_path, capsys, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="transformers: pip install 'transformers==5.24.*'")
    safetensors = pytest.importorskip("safetensors", reason="safetensors: pip install safetensors")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
    module = CausalModel(24)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    arguments = ["export", str(tmp_path / "last.ckpt"), str(tmp_path / "folder"), "--format", "pretrained"]
    assert main([*arguments, "--model", "test_commands.CausalModel", "--model.width", "24"]) == 0
    assert "intermediate_size 64 -> 24" in capsys.readouterr().out
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder", local_files_only=True)
    assert torch.equal(loaded.lm_head.weight, module.net.lm_head.weight)
    assert main([*arguments, "--model", "test_commands.CausalModel", "--tokenizer", str(tmp_path / "none")]) == 1
    assert main([*arguments, *MODEL, "--runtime", "openvino"]) == 1
    assert main([*arguments[:3], *MODEL, "--quantization", "gptq"]) == 1
    file = tmp_path / "model.safetensors"
    assert main([*arguments[:2], str(file), "--model", "test_commands.CausalModel", "--model.width", "24"]) == 0
    with safetensors.safe_open(file, "pt") as opened:
        assert opened.get_slice("net.model.layers.0.mlp.up_proj.weight").get_shape() == [24, 32]
        assert json.loads(opened.metadata()["lightning_optim"])["model"] == "test_commands.CausalModel"
    assert main([*arguments[:2], str(file), *MODEL, "--runtime", "openvino"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1] == "error: --runtime has no meaning with --format safetensors."
    assert errors[-3:-1] == [
        "error: --runtime has no meaning with --format pretrained.",
        "error: --quantization has no meaning with --format onnx.",
    ]


def first_image(model, batch):
    """What ``--prepare`` names: the net without the LightningModule, and one image."""
    return model.net, batch[0][:1]


@pytest.mark.slow
def test_export_of_what_is_deployed(runs, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    arguments = ["export", str(runs / "teacher" / "teacher.ckpt"), str(tmp_path / "net.onnx"), *MODEL, *DATA]
    assert main([*arguments, "--prepare", "test_commands.first_image"]) == 0
    assert (tmp_path / "net.onnx").is_file()


@pytest.mark.usefixtures("empty_pictures")
def test_compare(runs, tmp_path, capsys):
    arguments = [f"dense={runs / 'teacher' / 'teacher.ckpt'}", str(runs / "student" / "student.ckpt"), *MODEL, *DATA]
    options = ["--accuracy", "val_acc", "--engines", "onnxruntime", "--batch_size", "2", "--report", str(tmp_path)]
    assert main(["compare", *arguments, *options, "--samples", "16"]) == 0
    assert "student" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["samples"] == 16
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["student"]["parameters"] < rows["dense"]["parameters"]
    assert rows["student"]["integer_kernels"] == rows["student"]["kernels"] > 0
    assert (tmp_path / "report.html").is_file()


def test_recommend(capsys):
    words = ["--devices", "8", "--memory_gb", "80", "--batch_size", "2", "--tokens_per_sample", "8192"]
    assert main(["recommend", "--parameters", "8e9", *words]) == 0
    assert "optim_fsdp: fits" in capsys.readouterr().out
    assert (
        main(["recommend", *MODEL, "--devices", "2", "--memory_gb", "1", "--batch_size", "2", "--optimizer", "adam"])
        == 0
    )
    assert "optim_single" in capsys.readouterr().out


def test_recipes(capsys, tmp_path):
    assert main(["recipes"]) == 0
    assert "cpu-latency" in capsys.readouterr().out
    assert main(["recipes", "small-file"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert Recipe.load(tmp_path / "mine.yaml") == Recipe.load("small-file")


QUIET_TRAINER = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
QUIET = ["--trainer.logger", "false", "--trainer.accelerator", "cpu"]
FIT = ["fit", *MODEL, *DATA, *QUIET]
MISTAKES = [
    (["show", "absent.ckpt"], "there is no checkpoint file 'absent.ckpt'"),
    (["recipes", "tiny"], "unknown recipe 'tiny'; known: cpu-latency"),
    (["fit", *MODEL, *DATA, "--recipe", "tiny"], "unknown recipe 'tiny'"),
    (["fit", *MODEL, *DATA, *QUIET, "--recipe", "{weight_pruning: 80}"], "For 80 % zeros pass 0.8"),
    (["fit", *MODEL, *DATA, *QUIET, "--recipe", "{quantisation: true}"], "unknown keys 'quantisation'"),
    (
        ["fit", *MODEL, *DATA, *QUIET, "--recipe", "small-file", "--teacher", MODEL[1]],
        "no `distillation`, and a teacher",
    ),
    (["fit", *MODEL, *DATA, *QUIET, "--teacher_ckpt", "x.ckpt"], "`teacher_ckpt` needs `teacher`"),
    (["compare", "a.ckpt", *MODEL, *DATA], "there is no checkpoint file 'a.ckpt'"),
    (["export", "a.ckpt", "b.onnx", *MODEL, *DATA], "there is no checkpoint file 'a.ckpt'"),
    (["recommend", "--parameters", "8e9", "--devices", "0", "--batch_size", "1"], "`devices` must be"),
    (["consolidate", "absent", "file.ckpt"], "there is no folder"),
    (["fit"], "`model` is missing: `fit` takes --config FILE, or --model CLASS"),
    (["fit", *MODEL, *QUIET], "`fit` has no data: give --data CLASS"),
    (["export", "a.ckpt", "b.onnx"], "`model` is missing: `export` takes --config FILE, or --model CLASS"),
    (["export", "a.ckpt", ".", *MODEL, *DATA], "'.' is a folder"),
    (["compare", "a.ckpt"], "`model` is missing: `compare` takes --config FILE, or --model CLASS"),
    (["compare", "=a.ckpt", *MODEL, *DATA], "'=a.ckpt' has no name before `=`"),
    (["recommend", "--devices", "2", "--batch_size", "2"], "`model` is missing: `recommend` takes --config FILE"),
    (["test", *MODEL, *DATA, *QUIET, "--ckpt_path", "best"], "--ckpt_path best: `test` is a separate run"),
    (["test", *MODEL, *DATA, *QUIET, "--ckpt_path", "."], "there is no checkpoint file '.'"),
    (
        ["fit", *MODEL, *DATA, *QUIET, "--trainer.strategy", "optim_fdsp"],
        "Did you mean 'optim_fsdp'? Presets of lightning",
    ),
    (["fit", *MODEL, *DATA, *QUIET, "--trainer.strategy", "fsdp2"], "Did you mean 'optim_fsdp'?"),
    (["fit", *MODEL, *DATA, *QUIET, "--trainer.strategy", "lightning_optim.strategies.OptimDDP"], "{class_path: "),
    (["fit", *MODEL, *DATA, *QUIET, "--trainer.precision", "int8"], "`trainer.precision` must be one of "),
    (["fit", *MODEL, *DATA, *QUIET, "--optimizer", "Addam"], "`optimizer`: there is no class 'Addam'. Pass its import"),
    (["fit", *MODEL, *DATA, *QUIET, "--wrong", "1"], "`lightning-optim fit --help` lists its arguments"),
    (["fit", "--model", "nowhere.Net", *DATA], "`model`: there is no class 'nowhere.Net' (No module named 'nowhere')"),
    (["fit", "--model", DATA[1], *DATA], f"`model`: {DATA[1]} is no LightningModule"),
    (["fit", "--model", "lightning_optim.demo.DigitNet"], "Did you mean 'lightning_optim.demo.DigitsNet'?"),
    (["fit", *MODEL, "--model.widht", "3", *DATA], f"{MODEL[1]} has no argument 'widht'. Did you mean 'width'?"),
    (["fit", *MODEL, "--model.width", "three", *DATA], "`model.width`: Expected a int. Got value: three"),
    (
        ["fit", *MODEL, *DATA, *QUIET, "--trainer.callbacks", "lightning_optim.WeightPrunning"],
        "Did you mean 'lightning_optim.WeightPruning'?",
    ),
    *(
        ([*command, "--config", "absent.yaml"], "there is no configuration file")
        for command in (
            ["fit"],
            ["predict"],
            ["export", "a.ckpt", "b.onnx"],
            ["compare", "a.ckpt"],
            ["recommend", "--devices", "2", "--batch_size", "2"],
        )
    ),
    (["fit", "--config", "."], "there is no configuration file"),
    *(
        (
            ["fit", *MODEL, *DATA, *QUIET, f"--trainer.callbacks+={path}", "--trainer.callbacks.monitor", "P"],
            "to log it",
        )
        for path in (
            "lightning.pytorch.callbacks.ModelCheckpoint",
            "lightning.pytorch.callbacks.EarlyStopping",
            "lightning_optim.CompressedCheckpoint",
        )
    ),
]


@pytest.mark.parametrize(("arguments", "says"), MISTAKES, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_a_mistake_is_one_sentence_and_exit_code_1(arguments, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # without it Lightning warns
    assert main(arguments) == 1
    (written,) = capsys.readouterr().err.splitlines()
    assert written.startswith("error: ")
    assert says in written


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["show"], ["recommend"]],
    ids=str,
)
def test_words_that_are_none_end_with_exit_code_2(arguments, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_more_mistakes_with_files(runs, capsys, tmp_path):
    files = [str(runs / "teacher" / "teacher.ckpt"), *MODEL, *DATA]
    (tmp_path / "broken.ckpt").write_bytes((runs / "teacher" / "teacher.ckpt").read_bytes()[:1000])
    for arguments, says in (
        (["show", str(tmp_path / "broken.ckpt")], "is not a complete Lightning checkpoint"),
        (["compare", files[0], *files, "--accuracy", "val_acc"], "two checkpoints are called 'teacher'"),
        (["compare", *files, "--accuracy", "f1"], "--accuracy f1: validate logged val_acc, val_loss"),
        (["compare", *files, "--engines", "tensorrt"], "tensorrt"),
        (["compare", *files, "--samples", "16"], "--samples is the number behind --accuracy, which is not given"),
        (["compare", *files, "--samples", "0", "--accuracy", "val_acc"], "samples"),
        (["compare", files[0], *MODEL], "there are no inputs: pass --data"),
        (["export", files[0], str(tmp_path / "n.onnx"), *files[1:], "--prepare", "nowhere.f"], "--prepare must name"),
    ):
        assert main(arguments) == 1, arguments
        assert says in capsys.readouterr().err


def test_an_error_in_the_users_own_module_keeps_its_traceback(monkeypatch, tmp_path):
    def broken(self, batch, batch_idx):
        raise ValueError("a bug of the user's")

    monkeypatch.setattr(DigitsNet, "training_step", broken)
    with pytest.raises(ValueError, match="a bug of the user's"):
        main(["fit", "--config", str(config(tmp_path, "broken", 6))])


def test_a_refusal_at_fit_start_is_one_sentence(capsys, tmp_path):
    path = config(tmp_path, "refused", 6, recipe={"weight_pruning": {"sparsity": 0.5, "include": ["nothing"]}})
    assert main(["fit", "--config", str(path)]) == 1
    assert "include: 'nothing' matches no layer" in capsys.readouterr().err


def test_an_invalid_yaml_configuration_is_one_sentence(capsys, tmp_path):
    for text, says in (("model: [1, 2\n", "line 1, column 8"), ("hello\n", "not a YAML mapping: hello")):
        (tmp_path / "broken.yaml").write_text(text)
        assert main(["fit", "--config", str(tmp_path / "broken.yaml")]) == 1
        (written,) = capsys.readouterr().err.splitlines()
        assert says in written


def test_what_lightning_refuses_while_it_runs_is_one_sentence(capsys, tmp_path):
    path = config(tmp_path, "stopped", 6)
    stop = ["--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor", "val_f1"]
    assert main(["fit", "--config", str(path), *stop, "--trainer.max_epochs", "1"]) == 1
    assert "conditioned on metric `val_f1` which is not available" in capsys.readouterr().err


def test_show_prints_the_version_of_torch_with_its_build(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.13.0+cu130"))
    _versions.cache_clear()
    path = config(tmp_path, "local", 6, recipe={"weight_pruning": {"sparsity": 0.5, "every_n_steps": 2}})
    assert main(["fit", "--config", str(path), "--trainer.max_epochs", "1"]) == 0
    _versions.cache_clear()
    capsys.readouterr()
    assert main(["show", str(tmp_path / "local" / "local.ckpt")]) == 0
    assert "2.13.0+cu130" in capsys.readouterr().out


def test_without_jsonargparse_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert main(["fit", *MODEL]) == 1
    assert 'pip install "lightning-optim[cli]"' in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_is_one_screen_with_an_example(command, capsys):
    with contextlib.suppress(SystemExit):  # argparse ends by it
        main([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: lightning-optim {command}")
    assert len(lines) <= 55
    if command == "demo":  # it needs no argument
        return
    about, found, example = " ".join(" ".join(lines).split()).partition(f"example: lightning-optim {command} ")
    assert found
    words = example.split()
    options = {word.partition(".")[0] for word in words if word.startswith("--")} - {"--config"}
    assert options <= set(re.findall(r"--[a-z_]+", about))
    if "--recipe" in words or command == "recipes":
        Recipe.load(words[words.index("--recipe") + 1] if "--recipe" in words else words[0])


def test_help_all_lists_the_arguments_of_the_trainer(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["validate", "--help_all"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "--trainer.accelerator" in printed
    assert "--ckpt_path" in printed


def test_the_short_help_of_fit_names_arguments_that_it_has(capsys):
    main(["fit", "--help"])
    short = set(re.findall(r"--[a-z_]+", capsys.readouterr().out)) - {"--help_all", "--trainer"}
    with pytest.raises(SystemExit):
        main(["fit", "--help_all"])
    assert short <= set(re.findall(r"--[a-z_]+", capsys.readouterr().out))


@pytest.mark.parametrize(
    "command",
    [
        pytest.param([str(Path(sys.executable).parent / "lightning-optim")], id="script"),
        pytest.param([sys.executable, "-m", "lightning_optim"], id="module"),
    ],
)
@pytest.mark.slow  # .ci/run calls the script of the wheel
def test_the_console_script_and_python_m(tmp_path, command):
    found = subprocess.run([*command, "--version"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert found.stdout.startswith("lightning-optim 0.")


@pytest.mark.parametrize("arguments", [["demo"], ["compare", "a.ckpt", *MODEL, *DATA]], ids=lambda words: words[0])
def test_a_report_that_cannot_be_written_is_said_before_anything_runs(arguments, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main([*arguments, "--report", str(tmp_path / "file" / "below")]) == 1
    assert "`--report` must be a folder" in capsys.readouterr().err


def test_demo_asks_for_what_it_needs(monkeypatch, capsys):
    from lightning_optim.cli import demo

    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "sklearn" else object())
    assert main(["demo"]) == 1
    assert 'pip install "lightning-optim[examples]"' in capsys.readouterr().err


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    assert main(["demo", "--report", str(tmp_path)]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "report.json").read_text())["rows"]}
    dense, control, made = (rows[name] for name in ("dense", "half as wide, from scratch", "all techniques"))
    assert made["onnx_bytes"] < control["onnx_bytes"] < dense["onnx_bytes"]
    assert made["accuracy"] > 0.95
    assert "report:" in capsys.readouterr().out
    assert (tmp_path / "run" / "report.html").is_file()
    assert WeightPruning.__name__ in (tmp_path / "run" / "report.html").read_text()


class WithBackbone(pl.LightningModule):
    """What is saved of its arguments is not all that it takes."""

    def __init__(self, backbone: torch.nn.Module, width: int = 4, bug: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone"])
        if bug:
            raise ValueError("a bug of the user's")
        layers = (torch.nn.Flatten(), torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, 10))
        self.net = torch.nn.Sequential(backbone, *layers)

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.fixture
def backbone(tmp_path, monkeypatch):
    """A checkpoint of a class whose arguments it holds only in part, and what says the rest."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    words = ["--model", "test_commands.WithBackbone", "--model.backbone", "torch.nn.Identity", *DATA]
    model = WithBackbone(torch.nn.Identity(), width=6)
    run = pl.Trainer(max_epochs=1, limit_train_batches=1, **QUIET_TRAINER)
    run.fit(model, datamodule=DigitsData())
    run.save_checkpoint(tmp_path / "py.ckpt")
    return str(tmp_path / "py.ckpt"), words


def test_arguments_that_the_file_does_not_hold_come_from_the_configuration(backbone, tmp_path):
    file, words = backbone
    assert main(["export", file, str(tmp_path / "net.onnx"), *words]) == 0
    assert (tmp_path / "net.onnx").is_file()


def test_nothing_that_a_checkpoint_names_is_imported(backbone, tmp_path):
    file, words = backbone
    content = torch.load(file, weights_only=True)
    content["hyper_parameters"]["backbone"] = {"class_path": "evil.Module"}
    torch.save(content, file)
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    assert main(["export", file, str(tmp_path / "net.onnx"), *words]) == 0


def test_a_bug_of_the_users_own_module_keeps_its_traceback_in_every_command(backbone, tmp_path, monkeypatch):
    file, words = backbone
    with pytest.raises(ValueError, match="a bug of the user's"):
        main(["fit", *words, "--model.bug", "true", *QUIET])
    monkeypatch.setattr(WithBackbone, "validation_step", broken_validation)
    with pytest.raises(AttributeError, match="another bug"):
        main(["export", file, str(tmp_path / "net.onnx"), *words])


def broken_validation(self, batch, batch_idx):
    raise AttributeError("another bug of the user's")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:The dirpath has changed")
def test_a_compressed_or_distilled_file_is_tested_without_a_recipe(runs, capsys, tmp_path):
    assert (
        main(
            ["test", *MODEL, "--model.width", "6", *DATA, *QUIET, "--ckpt_path", str(runs / "student" / "student.ckpt")]
        )
        == 0
    )
    assert "test_acc" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fit", *MODEL, *DATA, *QUIET, "--ckpt_path", "nofile.ckpt"], "there is no checkpoint file 'nofile.ckpt'"),
        (["test", *MODEL, *DATA, *QUIET, "--ckpt_path", "junk.ckpt"], "is not a complete Lightning checkpoint"),
        (["show", "newer.ckpt"], "plan has version 99"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_wrong_with_a_file_is_said_before_anything_runs(arguments, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "junk.ckpt").write_bytes(b"no checkpoint at all")
    torch.save({"state_dict": {}, "lightning_optim": {"version": 99, "package": "9.9"}}, tmp_path / "newer.ckpt")
    assert main(arguments) == 1
    assert says in capsys.readouterr().err


def test_show_prints_brackets_as_they_are(tmp_path, capsys):
    content = {
        "state_dict": {},
        "hyper_parameters": {"layers": ["encoder", "decoder"], "paths": ["/data/a"]},
        "lightning_optim": {
            "version": 1,
            "provenance": {"recipe": {"weight_pruning": {"include": ["torch.nn.Linear"]}}},
        },
    }
    torch.save(content, tmp_path / "[bold]x.ckpt")
    assert main(["show", str(tmp_path / "[bold]x.ckpt")]) == 0
    shown = capsys.readouterr().out.replace("\n", "")  # a long folder breaks the line
    for text in ("[bold]x.ckpt", "[encoder, decoder]", "[/data/a]", "[torch.nn.Linear]"):
        assert text in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["recommend", "--parameters", "inf", "--devices", "1", "--batch_size", "1"],
        ["export", "a", "b", "--dynamic_dims", "["],
    ],
    ids=str,
)
def test_values_that_are_none_end_with_exit_code_2(arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
