"""A model in a file: the same numbers, without learnkit or the model's class, whole or not at all, and nothing in it is
executed.
"""

import io
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from learnkit import DataBunch, Learner, accuracy, load_learner
from learnkit.__main__ import main
from learnkit.checkpoint.files import Damaged
from learnkit.export.pt2 import EXPRESSION, OPERATOR, sealed_archive

STATS = ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def learner(model: nn.Module | None = None, **options: Any) -> Learner:
    x = torch.randn(16, 3, 8, 8)
    data = DataBunch.from_tensors(
        (x, torch.randint(3, (16,))), (x[:4], torch.randint(3, (4,))), bs=4, classes=["ant", "bee", "cat"]
    )
    return Learner(data, model or net(), metrics=accuracy, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One learner's files, made once: tracing takes seconds."""
    folder, learn = tmp_path_factory.mktemp("exported"), learner().fit(1)
    for name in ("m.pt2", "m.safetensors"):
        learn.export(folder / name, stats=STATS)
    learn.save(str(folder / "saved"))
    x = torch.randn(5, 3, 8, 8)
    torch.save({"x": x, "y": learn.predict(x), "values": learn.values}, folder / "expected.pt")
    return folder


def expected(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "expected.pt", weights_only=True)


# --- the same numbers --------------------------------------------------------
@pytest.mark.parametrize("name", ["m.pt2", "m.safetensors"])
def test_a_loaded_file_predicts_as_the_learner_did_for_batches_of_any_size_and_samples(folder, name):
    predictor = load_learner(folder / name, model=net() if name.endswith("safetensors") else None)
    x, y = expected(folder)["x"], expected(folder)["y"]
    assert torch.equal(predictor.predict(x), y)
    for i in range(5):
        assert torch.allclose(predictor.predict(x[i]), y[i], atol=1e-6) and predictor.predict(x[i]).shape == (3,)
    assert predictor.classes == ["ant", "bee", "cat"] and predictor.info["stats"] == [list(part) for part in STATS]
    assert (
        predictor.info["inputs"] == [{"name": "x0", "dtype": "float32", "shape": [3, 8, 8]}]
        and predictor.info["parameters"] == 135
    )
    assert predictor.info["values"] == pytest.approx(expected(folder)["values"])


def test_onnx_runs_in_its_own_runtime_and_by_load_learner():
    runtime: Any = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    learn = learner(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))
    learn.export("m.onnx")
    x = torch.randn(7, 3, 8, 8)
    session = runtime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"])
    assert torch.allclose(torch.from_numpy(session.run(None, {"x0": x.numpy()})[0]), learn.predict(x), atol=1e-6)
    predictor = load_learner("m.onnx")
    assert torch.allclose(predictor.predict(x), learn.predict(x), atol=1e-6) and predictor.classes == [
        "ant",
        "bee",
        "cat",
    ]
    assert pytest.importorskip("onnx").load("m.onnx").metadata_props[-1].key == "sha256"
    whole = Path("m.onnx").read_bytes()
    for damaged in (whole[:-1], whole[:100] + bytes([whole[100] ^ 1]) + whole[101:], b""):
        Path("d.onnx").write_bytes(damaged)
        with pytest.raises(Damaged, match="does not end in the hash"):
            load_learner("d.onnx")


RUN = """\
import sys, torch
sys.modules["learnkit"] = None      # an import of it fails, though it may be installed
said = torch.load(sys.argv[2], weights_only=True)
model = torch.export.load(sys.argv[1]).module()
print(float((model(said["x"]) - said["y"]).abs().max()))
try: import learnkit
except ImportError: print("no learnkit")
"""


def test_plain_torch_runs_the_file_without_learnkit(folder):
    done = subprocess.run(
        [sys.executable, "-I", "-c", RUN, str(folder / "m.pt2"), str(folder / "expected.pt")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[0]) < 1e-6 and done.stdout.split("\n")[1] == "no learnkit"


def test_the_safetensors_file_is_read_by_safetensors(folder):
    safetensors: Any = pytest.importorskip("safetensors")
    saved = torch.load(folder / "saved.pt", weights_only=True)["model"]
    with safetensors.safe_open(folder / "m.safetensors", "pt") as file:
        assert json.loads(file.metadata()["learnkit"])["model"] == "Sequential"
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert found.keys() == saved.keys() and all(torch.equal(found[name], saved[name]) for name in saved)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.layer(left) + self.layer(right)


def test_models_of_several_inputs_and_of_mappings():
    left, right = torch.randn(4, 2), torch.randn(4, 2)
    rows = [{"left": left, "right": right, "labels": torch.randint(3, (4,))}]
    learn = Learner(DataBunch(rows), TwoInputs())
    for name in ("named.pt2", "named.safetensors"):
        learn.export(name)
        predictor = load_learner(name, model=TwoInputs() if name.endswith("safetensors") else None)
        assert [entry["name"] for entry in predictor.info["inputs"]] == ["left", "right"]
        assert torch.allclose(
            predictor.predict({"right": right, "left": left}), learn.predict({"left": left, "right": right})
        )
        assert predictor.predict((left[0], right[0])).shape == (3,)


# --- whole or not at all -----------------------------------------------------
def test_nothing_of_the_learner_changes():
    learn = learner()
    learn.model[1].eval()
    state, generator = {k: v.clone() for k, v in learn.model.state_dict().items()}, torch.get_rng_state()
    learn.export("m.safetensors")
    assert all(torch.equal(v, state[k]) for k, v in learn.model.state_dict().items()) and torch.equal(
        generator, torch.get_rng_state()
    )
    assert learn.model.training and not learn.model[1].training and not list(Path().glob(".*"))


class Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(192, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1)) + torch.rand(3)


class Branches(Draws):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1)) if x.sum() > 0 else x.flatten(1)[:, :3]


def test_a_model_that_gives_other_numbers_or_cannot_be_traced_leaves_no_file():
    with pytest.raises(
        RuntimeError, match=r"the outputs of the exported model and the model differ.*Does it draw random numbers"
    ):
        learner(Draws()).export("m.pt2")
    with pytest.raises(Exception) as caught:  # noqa: PT011  # whichever torch.export has
        learner(Branches()).export("m.pt2")
    assert any(".safetensors" in note for note in caught.value.__notes__)
    assert list(Path().iterdir()) == []


def test_a_failed_write_leaves_the_file_before_it(monkeypatch):
    learn = learner()
    learn.export("m.safetensors")
    before = Path("m.safetensors").read_bytes()
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"could not write m.safetensors.*is intact"):
        learn.fit(1).export("m.safetensors")
    assert Path("m.safetensors").read_bytes() == before and len(list(Path().iterdir())) == 1


@pytest.mark.parametrize("name", ["m.pt2", "m.safetensors"])
def test_every_damage_is_found(folder, name):
    whole = bytearray((folder / name).read_bytes())
    for place in [*range(0, len(whole), max(1, len(whole) // 150)), len(whole) - 1]:
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        Path(name).write_bytes(changed)
        with pytest.raises(Damaged):
            load_learner(name, model=net() if name.endswith("safetensors") else None)
    for n in (0, 10, len(whole) // 2, len(whole) - 1):
        Path(name).write_bytes(whole[:n])
        with pytest.raises(Damaged):
            load_learner(name, model=net() if name.endswith("safetensors") else None)


# --- hostile files -----------------------------------------------------------
class Canary:
    def __reduce__(self) -> Any:
        return open, ("canary", "w")


def rewritten(folder: Path, change: Any) -> None:
    """The .pt2 file with its members changed, sealed anew."""
    with zipfile.ZipFile(folder / "m.pt2") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    top = next(iter(members)).partition("/")[0]
    inner = {name.partition("/")[2]: data for name, data in members.items()}
    change(inner)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in inner.items():
            archive.writestr(f"{top}/{name}", data)
    Path("m.pt2").write_bytes(sealed_archive(buffer.getvalue()))


def in_graph(change: Any) -> Any:
    def changed(members: dict[str, bytes]) -> None:
        graph = json.loads(members["models/model.json"])
        change(graph)
        members["models/model.json"] = json.dumps(graph).encode()

    return changed


def first_node(graph: Any) -> Any:
    return graph["graph_module"]["graph"]["nodes"][0]


def as_pickle() -> bytes:
    buffer = io.BytesIO()
    torch.save((Canary(),), buffer)
    return buffer.getvalue()


def pickled_weights(members: dict[str, bytes]) -> None:
    config = json.loads(members["data/weights/model_weights_config.json"])
    next(iter(config["config"].values()))["use_pickle"] = True
    members["data/weights/model_weights_config.json"], members["data/weights/weight_0"] = (
        json.dumps(config).encode(),
        as_pickle(),
    )


def opaque_constant(members: dict[str, bytes]) -> None:
    members["data/constants/opaque_obj_0"] = pickle.dumps(Canary())


HOSTILE = {
    "pickled example inputs": lambda m: m.update({"data/sample_inputs/model.pt": as_pickle()}),
    "pickled weights": pickled_weights,
    "a pickled constant": opaque_constant,
    "old weights": lambda m: m.update({"data/weights/model.pt": as_pickle()}),
    "compiled code": lambda m: m.update({"data/aotinductor/model/a.so": b"\x7fELF"}),
    "torch.hub": in_graph(lambda g: first_node(g).update(target="torch.hub.load")),
    "attrgetter": in_graph(lambda g: first_node(g).update(target="_operator.attrgetter")),
    "a file's memory": in_graph(lambda g: first_node(g).update(target="torch.ops.aten.from_file.default")),
    "an expression": in_graph(lambda g: first_node(g)["metadata"].update(expr_str="open('canary', 'w')")),
    "a name": in_graph(lambda g: first_node(g).update(name="x; open('canary', 'w')")),
    "guards": in_graph(lambda g: g.update(guards_code=["open('canary', 'w')"])),
    "a class": in_graph(
        lambda g: g["graph_module"]["module_call_graph"][0]["signature"].update(
            in_spec='[1, {"type": "subprocess.Popen", "context": "null", "children_spec": []}]'
        )
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_holds_more_than_tensors_and_operators_is_refused_unexecuted(folder, case):
    rewritten(folder, HOSTILE[case])
    with pytest.raises(Damaged, match=r"does not write: nothing was loaded|is not an archive of torch"):
        load_learner("m.pt2")
    assert not Path("canary").exists()


def test_an_archive_that_was_only_repacked_loads(folder):
    rewritten(folder, lambda members: None)
    assert torch.equal(load_learner("m.pt2").predict(expected(folder)["x"]), expected(folder)["y"])


@pytest.mark.parametrize(
    "text",
    [
        "s77",
        "Integer(2)",
        "Symbol('s21', positive=True, integer=True)",
        "FloorDiv(Symbol('s0', integer=True), Integer(4))",
        "Add(Mul(Integer(-1), Symbol('u0', integer=True)), Integer(3))",
    ],
)
def test_sizes_as_sympy_writes_them_are_accepted(text):
    assert EXPRESSION.fullmatch(text)


@pytest.mark.parametrize(
    "text",
    [
        "exit()",
        "Symbol('s21').func",
        "__import__",
        "Symbol('s1', positive=open)",
        "s1.args",
        "[s1]",
        "lambda: 1",
        "s1;s2",
        "9" * 5000 + "!",
    ],
)
def test_other_expressions_are_not(text):
    assert not EXPRESSION.fullmatch(text)


@pytest.mark.parametrize(
    "text",
    [
        "torch.ops.higher_order.cond",
        "torch.load",
        "torch.ops.aten.from_file.default",
        "_operator.methodcaller",
        "os.system",
        "torch.ops.aten.relu.default.__class__",
    ],
)
def test_other_operators_are_not(text):
    assert not OPERATOR.fullmatch(text)


# --- wrong use ---------------------------------------------------------------
def test_wrong_names_and_models_are_told(folder):
    with pytest.raises(ValueError, match=r"ends in \.bin, expected \.pt2, \.onnx, \.safetensors"):
        learner().export("m.bin")
    with pytest.raises(ValueError, match=r"To load a file of learn.save, use learn.load"):
        load_learner(folder / "saved.pt")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt2 does not exist"):
        load_learner("nowhere.pt2")
    with pytest.raises(TypeError, match="pass load_learner"):
        load_learner(folder / "m.safetensors")
    with pytest.raises(TypeError, match="contains its model"):
        load_learner(folder / "m.pt2", model=net())
    other = net()
    other[6] = nn.Linear(4, 2)  # type: ignore[index]
    with pytest.raises(ValueError, match="is of another model; 2 differences"):
        load_learner(folder / "m.safetensors", model=other)
    with pytest.raises(ValueError, match=r"expected samples of shapes \[\(3, 8, 8\)\]"):
        load_learner(folder / "m.pt2").predict(torch.zeros(8))
    with pytest.raises(ValueError, match="one per channel"):
        learner().export("m.safetensors", stats=([0.5], [0.0]))


# --- the command line --------------------------------------------------------
def picture(path: str) -> torch.Tensor:
    from PIL import Image

    pixels = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    return pixels


def test_predict_prints_the_likeliest_classes_of_pictures(folder, capsys):
    pixels = picture("a.png")
    assert main(["predict", str(folder / "m.pt2"), "a.png", "a.png", "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    mean, std = (torch.tensor(part)[:, None, None] for part in STATS)
    shares = load_learner(folder / "m.pt2").predict((pixels / 255 - mean) / std).softmax(0)
    order = shares.argsort(descending=True).tolist()
    assert (
        lines[0].split("\t") == ["a.png", *(f"{['ant', 'bee', 'cat'][i]} {shares[i]:.4f}" for i in order)]
        and lines[1] == lines[0]
    )


def test_pictures_of_other_sizes_and_without_colours_are_brought_to_the_models(folder):
    from PIL import Image

    Image.fromarray(torch.full((20, 30), 128, dtype=torch.uint8).numpy()).save("grey.png")
    x = torch.full((3, 8, 8), 128 / 255)
    mean, std = (torch.tensor(part)[:, None, None] for part in STATS)
    predictor = load_learner(folder / "m.pt2")
    shares = predictor.predict((x - mean) / std).softmax(0)
    assert predictor.predict_image("grey.png") == pytest.approx(
        dict(zip(["ant", "bee", "cat"], shares.tolist(), strict=True)), abs=1e-5
    )


def test_info_prints_what_the_file_is(folder, capsys):
    assert main(["info", str(folder / "m.pt2")]) == 0
    out = capsys.readouterr().out
    assert (
        "Sequential, 135 parameters" in out
        and "3: ant, bee, cat" in out
        and "float32 (3, 8, 8)" in out
        and "valid_loss" in out
    )


def test_what_cannot_be_used_is_told_on_stderr_with_exit_code_1(folder, capsys):
    Path("no.png").write_text("no picture")
    assert main(["predict", str(folder / "m.pt2"), "no.png"]) == 1 and main(["info", "nowhere.pt2"]) == 1
    err = capsys.readouterr().err
    assert "no.png cannot be read as a picture" in err and "nowhere.pt2 does not exist" in err
    with pytest.raises(SystemExit):
        main([])


def test_a_picture_is_prepared_as_the_folder_was_that_the_model_was_trained_on(capsys):
    from PIL import Image

    from learnkit.vision import ImageDataBunch

    generator = torch.Generator().manual_seed(0)
    for use in ("train", "valid"):
        for i, name in enumerate(("dark", "light")):
            Path(use, name).mkdir(parents=True)
            for k in range(4):
                pixels = torch.randint(100 * i, 100 + 100 * i, (12, 20, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(Path(use, name, f"{k}.png"))
    data = ImageDataBunch.from_folder(".", size=8, bs=4).normalize()
    learn = Learner(data, nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), metrics=accuracy).fit(20, 1e-2)
    learn.export("m.pt2")
    predictor, (preds, _) = load_learner("m.pt2"), learn.get_preds()
    files = [f"valid/{name}/{k}.png" for name in ("dark", "light") for k in range(4)]
    for file, pred in zip(files, preds.softmax(1).tolist(), strict=True):
        assert predictor.predict_image(file) == pytest.approx(dict(zip(["dark", "light"], pred, strict=True)), abs=1e-5)
    capsys.readouterr()
    assert main(["predict", "m.pt2", files[0], files[4]]) == 0
    assert [line.split("\t")[1].split()[0] for line in capsys.readouterr().out.splitlines()] == ["dark", "light"]
