"""The unchanged script inside Ray Train, on a real cluster of this machine: `make test-ray`."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("ray.train", reason="needs ray[train]: make test-ray installs it")
import ray

from learnkit.ray import RayReport, fit_on_ray
from tests.pages import Page
from tests.test_coming_from import PAGE as COMING_FROM
from tests.test_coming_from import blocks

pytestmark = pytest.mark.filterwarnings("default")  # Ray warns of its own deprecated settings
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    os.environ["RAY_AUTH_MODE"] = "disabled"
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": env})
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def runs(cluster, tmp_path_factory):
    """All runs of this file, as futures: three at a time, as each waits for its workers longer than it computes."""
    folder = tmp_path_factory.mktemp("runs")
    guides = [(names_after(first_block()), blocks("Ray Train")[which].code) for which in range(3)]
    page = names_after(DATA_AND_MODEL), page_block().replace('"runs"', repr(str(folder / "page")))
    with ThreadPoolExecutor(3) as pool:
        yield {
            "folder": folder,
            "killed": pool.submit(run, folder / "killed", True),
            "spread": pool.submit(spread_twice, folder / "spread"),
            "plain": pool.submit(run, folder / "plain", False),
            "shards": pool.submit(sharded, folder / "shards"),
            "guide": [pool.submit(result_of, *guide) for guide in guides],
            "page": pool.submit(result_of, *page),
        }


def learner(*callbacks):
    from torch import nn

    from learnkit import DataBunch, Learner, accuracy

    torch.manual_seed(0)
    x = torch.randn(72, 4)
    data = DataBunch.from_tensors((x, (x[:, 0] > 0).long()), (x[:15], (x[:15, 1] > 0).long()), bs=6)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))
    return Learner(data, model, metrics=accuracy, seed=1, callbacks=callbacks).to_distributed()


def weights(learn):
    return [p.tolist() for p in learn.model.parameters()]


def wait_for_ray(snapshot: Path) -> None:
    """Until Ray has taken up the first epoch's checkpoint, which it does about once a second; without it a run begins
    anew.
    """
    deadline = time.monotonic() + 60
    while not (snapshot.exists() and json.loads(snapshot.read_text())["checkpoint_results"]):
        assert time.monotonic() < deadline, "Ray has not taken up the checkpoint"
        time.sleep(0.1)


def script(config):
    """What a user runs; `config["kill"]`: the first start loses a worker in the middle of the second epoch."""
    import torch.distributed as dist
    from ray import train

    from learnkit import Callback

    class Kill(Callback):
        order = -300

        def before_batch(self, learn):
            mark = Path(config["folder"]) / "killed"
            if (
                config["kill"]
                and learn.training
                and learn.epoch == 1
                and learn.batch_index == 2
                and learn.rank == 1
                and not mark.exists()
            ):
                wait_for_ray(Path(config["folder"]) / "storage/run/checkpoint_manager_snapshot.json")
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)

    group = dist.group.WORLD
    learn = learner(RayReport(), Kill())
    learn.fit_one_cycle(3, 1e-2)
    assert dist.group.WORLD is group, "Ray's group is used and left alone"
    if learn.rank == 0:
        torch.save(
            {
                "weights": weights(learn),
                "losses": learn.recorder.losses,
                "world": learn.world_size,
                "resumed": learn.resumed is not None,
                "valid": learn.values["valid_loss"],
            },
            Path(config["folder"]) / "result.pt",
        )
    assert train.get_context().get_world_size() == learn.world_size == 2


def run(folder: Path, kill: bool):
    folder.mkdir()
    result = fit_on_ray(
        script,
        num_workers=2,
        config={"folder": str(folder), "kill": kill},
        storage_path=folder / "storage",
        name="run",
        max_failures=2,
    )
    return result, torch.load(folder / "result.pt", weights_only=True)


def test_a_run_that_lost_a_worker_in_an_epoch_ends_as_one_that_did_not(runs):
    (plain, whole), (killed, again) = runs["plain"].result(), runs["killed"].result()
    assert plain.error is None and killed.error is None
    assert (runs["folder"] / "killed/killed").exists() and again["resumed"] and not whole["resumed"]
    assert whole["world"] == 2
    for name in ("weights", "losses", "valid"):
        assert again[name] == whole[name], name
    assert plain.metrics["valid_loss"] == killed.metrics["valid_loss"] == whole["valid"]
    assert plain.metrics["epoch"] == 2

    with killed.checkpoint.as_directory() as folder:  # plain files, for plain torch
        [state] = Path(folder).glob("*/model.pt")
        loaded = torch.load(state, weights_only=True)
    assert [value.tolist() for value in loaded.values()] == whole["weights"]


def shards(config):
    import ray
    from torch import nn

    from learnkit import DataBunch, Learner
    from learnkit.ray import RayLoader

    seen = []

    class See(__import__("learnkit").Callback):
        def before_batch(self, learn):
            seen.extend(learn.inputs["x"][:, 0].tolist())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(x)

    loader = RayLoader(ray.train.get_dataset_shard("train"), bs=4, target="label")
    learn = Learner(DataBunch(loader), Net(), callbacks=[See()]).to_distributed()
    learn.fit(2, 1e-2)
    torch.save(seen, Path(config["folder"]) / f"rank{learn.rank}.pt")


def spread(config):
    """The model spread over the workers, and reported whole."""
    from torch import nn

    from learnkit import DataBunch, Learner
    from learnkit.distributed.fully_shard import is_fully_sharded

    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    learn = Learner(
        DataBunch.from_tensors((x, (x[:, 0] > 0).long()), bs=4),
        nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)),
        seed=1,
        callbacks=[RayReport()],
    ).to_fsdp(blocks=nn.Linear)
    learn.fit(1, 1e-2)
    assert is_fully_sharded(learn.model) and (learn.resumed is not None) == config["resumed"]
    (Path(config["folder"]) / f"resumed {learn.resumed is not None}").touch()


def sharded(folder: Path):
    import numpy as np

    folder.mkdir()
    rows = [{"x": np.array([i, 1.0, 2.0], dtype=np.float32), "label": i % 2} for i in range(32)]
    return fit_on_ray(
        shards,
        num_workers=2,
        config={"folder": str(folder)},
        datasets={"train": ray.data.from_items(rows)},
        storage_path=folder / "storage",
    )


def test_shards_of_a_ray_dataset_are_loaders_and_each_row_is_one_workers(runs):
    assert runs["shards"].result().error is None
    seen = [torch.load(runs["folder"] / f"shards/rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert sorted(seen[0] + seen[1]) == sorted(2 * [float(i) for i in range(32)])
    assert set(seen[0]).isdisjoint(seen[1])


def spread_twice(folder: Path):
    """The results of a run, and of one of the same name afterwards."""
    folder.mkdir()
    return [
        fit_on_ray(
            spread,
            num_workers=2,
            config={"resumed": resumed, "folder": str(folder)},
            storage_path=folder / "storage",
            name="run",
        )
        for resumed in (False, True)
    ]


def test_a_sharded_model_is_in_rays_checkpoint_as_a_plain_one_from_which_a_run_of_that_name_resumes(
    runs,
):
    from torch import nn

    for result in runs["spread"].result():
        with result.checkpoint.as_directory() as folder:
            [state] = Path(folder).glob("*/model.pt")
            nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)).load_state_dict(torch.load(state, weights_only=True))
    for resumed in (False, True):
        assert (runs["folder"] / f"spread/resumed {resumed}").exists()


# --- what the pages show -----------------------------------------------------
def first_block() -> str:
    return next(block for block in COMING_FROM.blocks if block.language == "python").code


def page_block() -> str:
    [block] = [
        block for block in Page("docs/distributed.md").blocks if block.language == "py" and "learnkit.ray" in block.code
    ]
    return block.code


def names_after(code: str) -> dict[str, object]:
    """What a block has made, as a script's: functions of these travel to the workers whole. It may draw numbers: one
    block at a time.
    """
    names: dict[str, object] = {"__name__": "__main__"}
    exec(compile(code, "train.py", "exec"), names)
    return names


def result_of(names: dict[str, object], code: str):
    exec(compile(code, "train.py", "exec"), names)
    return names["result"]


def test_the_guides_blocks_reach_one_accuracy_and_both_of_ours_the_same(runs):
    before, own, learner = (future.result() for future in runs["guide"])
    accuracies = [result.metrics["accuracy"] for result in (before, own, learner)]
    assert min(accuracies) > 0.92 and max(accuracies) - min(accuracies) < 0.06
    assert accuracies[1] == pytest.approx(accuracies[2], abs=1e-6)
    assert learner.checkpoint is not None and learner.metrics["epoch"] == 5


def test_the_block_of_the_page_on_many_processes_runs(runs):
    result = runs["page"].result()
    assert result.error is None and result.metrics["epoch"] == 2
    assert (runs["folder"] / "page/first").is_dir()


DATA_AND_MODEL = """
import torch
from torch import nn
from learnkit import DataBunch, Learner

def data():
    x = torch.randn(64, 4)
    return DataBunch.from_tensors((x, (x[:, 0] > 0).long()), (x, (x[:, 0] > 0).long()), bs=8)

def model(): return nn.Linear(4, 2)
"""


def test_without_ray_train_about_the_report_says_what_to_do():
    with pytest.raises(RuntimeError, match="run the function with fit_on_ray"):
        learner(RayReport()).fit(1)
