"""docs/coming-from.md: each guide's blocks before and after, on two ranks of a CPU, train alike."""

import os
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp  # so that forked ranks need not import it

from learnkit.devices.dtensor import whole
from learnkit.distributed import destroy_process_group, get_rank, launch, unwrap_model
from tests.pages import ROOT, Block, Page
from tests.test_examples import small_pictures

PAGE = Page("docs/coming-from.md")
ON_A_CPU = ((".cuda()", ""), ("torch.cuda.set_device(", "int("), ('"nccl"', '"gloo"'))  # what a block is changed in
SECTIONS = {"NVIDIA Apex": 3, "Bagua": 3, "BMTrain": 3, "fastai v1": 3, "Ray Train": 3}  # and how many blocks it has


def blocks(section: str) -> list[Block]:
    """The python blocks of a section."""
    headings = [*re.finditer(r"^## (.*)$", PAGE.text, re.MULTILINE), re.match(r".*\Z", PAGE.text, re.DOTALL)]
    start, end = next(
        (a.start(), b.start() or len(PAGE.text)) for a, b in pairwise(headings) if a and b and a[1] == section
    )
    return [block for block in PAGE.blocks if block.language == "python" and start < block.start < end]


def test_the_page_has_five_guides_with_a_block_before_and_two_after():
    assert re.findall(r"^## (.*)$", PAGE.text, re.MULTILINE) == list(SECTIONS)
    assert {section: len(blocks(section)) for section in SECTIONS} == SECTIONS


def run(codes: list[str], folder: str) -> dict[str, Any]:
    """The names that the blocks have made, run one after the other as a launcher's script."""
    os.chdir(folder)
    sys.path.insert(0, str(ROOT / "tests/stand_ins"))
    sys.argv = ["train.py", f"--local_rank={get_rank()}"]
    torch.set_num_threads(1)
    names: dict[str, Any] = {"__name__": "__main__"}
    for code in codes:
        for old, new in ON_A_CPU:
            code = code.replace(old, new)
        exec(compile(code, "train.py", "exec"), names)
    return names


def result(codes: list[str], folder: str) -> tuple[float, list[str], list[float]]:
    """(accuracy on the validation samples, the files that it wrote, the weights)"""
    names = run(codes, folder)
    model = unwrap_model(names["learn"].model if "learn" in names else names["model"]).eval()
    model = getattr(model, "module", model)  # of Apex's own wrapper
    x, y = names["valid_ds"].tensors
    with torch.no_grad():
        accuracy = float((model(x).argmax(1) == y).float().mean())
    weights = [value for p in model.parameters() for value in whole(p.detach()).flatten().tolist()]
    torch.distributed.barrier()
    if not destroy_process_group():
        torch.distributed.destroy_process_group()  # the block's own
    return accuracy, sorted(str(p) for p in Path().rglob("circle*")), weights


@pytest.mark.parametrize("section, files", [("NVIDIA Apex", 1), ("Bagua", 0), ("BMTrain", 1)])
def test_all_blocks_of_a_guide_reach_one_accuracy_and_both_of_ours_the_same_weights(section, files, tmp_path):
    first = next(block for block in PAGE.blocks if block.language == "python").code
    before, own, learner = (block.code for block in blocks(section))
    model = [own.split("init_process_group(seed=0)")[0]] if section == "BMTrain" else []
    found = []
    for i, codes in enumerate(([first, before], [first, own], [first, *model, learner])):
        folder = tmp_path / str(i)
        folder.mkdir()
        ranks = launch(result, 2, codes, str(folder), timeout=60, every_rank=True)
        assert ranks[0][2] == pytest.approx(ranks[1][2], abs=1e-7), "the ranks have one model"
        found.append(ranks[0])
    accuracies = [accuracy for accuracy, _, _ in found]
    assert min(accuracies) > 0.92 and max(accuracies) - min(accuracies) < 0.06
    assert [len(written) for _, written, _ in found] == [files] * 3
    assert found[1][2] == pytest.approx(found[2][2], abs=1e-6)
    assert found[0][2] != pytest.approx(found[2][2], abs=1e-2), "the control: another order of samples, other weights"


def test_fastais_script_is_ours_with_the_imports_renamed_and_runs_in_both_introductions(tmp_path, monkeypatch):
    before, renamed, short = (block.code for block in blocks("fastai v1"))
    assert before.replace("from fastai.", "from learnkit.") == renamed
    small_pictures(tmp_path / "pictures", 8, n=16, n_test=4)
    monkeypatch.setenv("LEARNKIT_DATA", str(tmp_path / "pictures"))
    monkeypatch.setenv("LEARNKIT_CACHE", str(tmp_path / "cache"))

    def losses(code: str) -> list[float]:
        for old, new in (
            ("bs=128", "bs=4"),
            ("fit_one_cycle(10", "fit_one_cycle(1"),
            ("rand_pad(4, 32)", "rand_pad(1, 8)"),
        ):
            assert old in code
            code = code.replace(old, new)
        learn = run([f"import torch\ntorch.manual_seed(0)\n{code}"], str(tmp_path))["learn"]
        return learn.recorder.losses

    old, new = (launch(losses, 2, code, timeout=100) for code in (renamed, short))
    assert len(old) == 4 and old == new
