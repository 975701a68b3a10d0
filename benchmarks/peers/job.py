"""The work every peer is given: model, data, optimizer, schedule. Runs inside a peer's venv.

A `Job` holds ready-made pieces; an entry (entries.py) only wires them into its library.
Order of samples is fixed (no shuffling, data is permuted once), so that every peer sees the same
batches in the same order and the final weights can be compared with a plain reference loop.
"""
import gzip, math, os, struct, subprocess, time

# ---------------------------------------------------------------- sizes
SIZES = {
    # A: step overhead. One "sample" of the dataset is a whole ready-made batch (DataLoader batch_size=None).
    "A": dict(batch=8, steps=1000, epochs=2, valid_steps=100, warm=200, lr=0.05),
    # B: real epoch.
    "B": dict(batch=128, train=12800, valid=2560, epochs=1, lr=0.08),
}


def sizes(workload, quick=False):
    s = dict(SIZES[workload])
    if quick and workload == "A": s.update(steps=150, valid_steps=20, warm=50)
    if quick and workload == "B": s.update(train=2560, valid=640)
    return s


# ---------------------------------------------------------------- data
def fashion_mnist_dir(arg=None):
    "Folder with the idx .gz files: argument, FASHION_MNIST, or wherever the Debian package put them; None if absent."
    for d in (arg, os.environ.get("FASHION_MNIST")):
        if d: return d
    try:
        out = subprocess.run(["dpkg", "-L", "dataset-fashion-mnist"], capture_output=True, text=True).stdout
        for line in out.splitlines():
            if line.endswith("train-images-idx3-ubyte.gz"): return os.path.dirname(line)
    except OSError: pass


def _idx(path, n):
    import numpy as np
    with gzip.open(path) as f:
        zero, kind, ndim = struct.unpack(">HBB", f.read(4))
        shape = struct.unpack(">" + "I" * ndim, f.read(4 * ndim))
        shape = (min(n, shape[0]),) + shape[1:]
        return np.frombuffer(f.read(math.prod(shape)), np.uint8).reshape(shape)


def images(where, n_train, n_valid):
    "((x, y) train, (x, y) valid) float images normalised, first n of each file; synthetic ones if there is no data."
    import numpy as np, torch
    out = []
    for stem, n in (("train", n_train), ("t10k", n_valid)):
        if where:
            x = _idx(os.path.join(where, f"{stem}-images-idx3-ubyte.gz"), n)
            y = _idx(os.path.join(where, f"{stem}-labels-idx1-ubyte.gz"), n)
        else:  # class prototypes plus noise, same shapes
            rng = np.random.default_rng(7 if stem == "train" else 8)
            y = rng.integers(0, 10, n).astype(np.uint8)
            proto = np.random.default_rng(6).integers(0, 200, (10, 28, 28))
            x = (proto[y] + rng.integers(0, 56, (n, 28, 28))).astype(np.uint8)
        x = torch.from_numpy(x.copy()).float().div_(255).sub_(0.286).div_(0.353).unsqueeze_(1)
        out.append((x, torch.from_numpy(y.astype(np.int64))))
    return out


class Data:
    """A map-style dataset over in-memory tensors that counts what is read and stamps when `stamps` indices are read.

    Deliberately no `__getitems__`: every peer then goes through the same per-item path."""
    def __init__(self, xs, ys, stamps=()):
        self.xs, self.ys, self.stamps = xs, ys, set(stamps)
        self.reset()
    def reset(self): self.n_read, self.times = 0, []
    def __len__(self): return len(self.xs)
    def __getitem__(self, i):
        self.n_read += 1
        if i in self.stamps: self.times.append((i, time.perf_counter(), time.process_time()))
        return self.xs[i], self.ys[i]


# ---------------------------------------------------------------- models
def mlp():
    import torch
    nn = torch.nn
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


def cnn():
    "No batch norm: then 2-process runs are comparable whichever way a peer shards a batch."
    import torch
    nn = torch.nn
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


# ---------------------------------------------------------------- the job
class Job:
    """workload 'A'|'B'; experience 'bare'|'default'; schedule 'const'|'onecycle'; world > 1 under torchrun.

    bare:    no progress bar, logging, metrics or validation, whatever the library calls those switches
    default: what the library's tutorial shows: its bar, its logging, accuracy, validation every epoch
    """
    _cache = {}

    def __init__(self, workload, experience="default", schedule="onecycle", *, epochs=None, steps=None,
                 data_dir=None, tmp=None, quick=False):
        import torch
        from torch.utils.data import DataLoader
        s = sizes(workload, quick)
        self.workload, self.experience, self.schedule, self.tmp = workload, experience, schedule, tmp
        self.bare = experience == "bare"
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.ddp = self.world > 1
        self.lr, self.momentum = s["lr"], 0.9
        self.epochs = epochs or s["epochs"]
        self.loss_fn = torch.nn.CrossEntropyLoss()
        if workload == "A":
            n, nv, bs = steps or s["steps"], s["valid_steps"], s["batch"]
            if self.bare and epochs is None: n, self.epochs = n * self.epochs, 1  # one long epoch
            g = torch.Generator().manual_seed(1)
            x = torch.randn(n + nv, bs, 16, generator=g)
            y = (x[..., :4].sum(-1) + 0.3 * torch.randn(n + nv, bs, generator=g) > 0).long()
            self.warm = min(s["warm"], n // 3)
            self.train_ds = Data(list(x[:n].unbind()), list(y[:n].unbind()), {self.warm, n - 1})
            self.valid_ds = Data(list(x[n:].unbind()), list(y[n:].unbind()))
            self.batch_size = None   # what a DataLoader over these datasets takes
            self.items_per_read = bs
            self.model, self.n_out = mlp(), 2
        else:
            key = (data_dir, s["train"], s["valid"])
            if key not in Job._cache: Job._cache[key] = images(*key)
            (x, y), (xv, yv) = Job._cache[key]
            if steps: x, y = x[:steps * s["batch"]], y[:steps * s["batch"]]
            n = len(x) // s["batch"]
            self.warm = 0
            self.train_ds, self.valid_ds = Data(x, y, {0}), Data(xv, yv)
            self.batch_size = s["batch"] // self.world    # per process; the global batch stays the same
            self.items_per_read = 1
            self.model, self.n_out = cnn(), 10
        self.global_batch = s["batch"]
        self.steps_per_epoch, self.total_steps = n, n * self.epochs
        # Not sharded: libraries that shard by themselves take these; `sharded` gives a raw loop its part.
        self.train_dl = DataLoader(self.train_ds, batch_size=self.batch_size, shuffle=False)
        self.valid_dl = None if self.bare else DataLoader(self.valid_ds, batch_size=self.batch_size, shuffle=False)

    # -- pieces for entries
    def optimizer(self, params=None):
        import torch
        return torch.optim.SGD(self.model.parameters() if params is None else params, lr=self.lr, momentum=self.momentum)

    def one_cycle_args(self): return dict(max_lr=self.lr, total_steps=self.total_steps)

    def scheduler(self, opt):
        "torch's OneCycleLR with its defaults (momentum cycles too), stepped every batch; None for constant LR."
        import torch
        return torch.optim.lr_scheduler.OneCycleLR(opt, **self.one_cycle_args()) if self.schedule == "onecycle" else None

    def sharded(self, ds):
        from torch.utils.data import DataLoader, DistributedSampler
        return DataLoader(ds, batch_size=self.batch_size,
                          sampler=DistributedSampler(ds, self.world, self.rank, shuffle=False))

    # -- checks
    def table(self, kind):
        "(lr, momentum) of every step under a schedule `kind`."
        import torch
        n = self.total_steps
        if self.schedule == "const": return [(self.lr, self.momentum)] * n
        if kind in ("torch", "keras"):
            opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=self.lr, momentum=self.momentum)
            sched, res = self.scheduler(opt), []
            for _ in range(n):
                res.append((opt.param_groups[0]["lr"], opt.param_groups[0]["momentum"]))
                opt.step(); sched.step()
            return [(lr, self.momentum) for lr, _ in res] if kind == "keras" else res
        cos = lambda a, b, t: a + (1 + math.cos(math.pi * (1 - t))) * (b - a) / 2
        if kind == "fastai2":  # fastai 2's fit_one_cycle defaults: position = fraction of training done
            p, res = 0.25, []
            for i in range(n):
                t = i / n
                f = (lambda a, b, c: cos(a, b, t / p) if t < p else cos(b, c, (t - p) / (1 - p)))
                res.append((f(self.lr / 25, self.lr, self.lr / 1e5), f(0.95, 0.85, 0.95)))
            return res
        if kind == "fastai1":  # fastai 1's OneCycleScheduler defaults: two phases counted in batches
            a1 = int(n * 0.3); a2 = n - a1
            lrs = [cos(self.lr / 25, self.lr, i / a1) for i in range(a1)] + [cos(self.lr, self.lr / 25e4, i / a2) for i in range(a2)]
            moms = [cos(0.95, 0.85, i / a1) for i in range(a1)] + [cos(0.85, 0.95, i / a2) for i in range(a2)]
            return list(zip(lrs, moms))
        if kind == "learnkit":  # the peak at step int(n * pct_start), the end exactly at the last step
            a, z = int(n * 0.3), n - 1
            piece = lambda i, x, y, w: cos(x, y, i / a) if i < a else cos(y, w, (i - a) / (z - a))
            return [(piece(i, self.lr / 25, self.lr, self.lr / 25e4), piece(i, 0.95, 0.85, 0.95)) for i in range(n)]
        raise ValueError(kind)

    def reference_loss(self, kind, shard=True):
        """Final loss of an independent plain loop in which lr and momentum come from the table. Single process, untimed.
        A global batch is the same set of samples whether ranks take alternate samples or alternate batches; shard="halves"
        is for a peer that gives every rank one contiguous part of the data."""
        import torch
        model = mlp() if self.workload == "A" else cnn()
        ps, table, i = list(model.parameters()), self.table(kind), 0
        vel = [torch.zeros_like(p) for p in ps]
        bs, xs, ys = self.global_batch, self.train_ds.xs, self.train_ds.ys
        if shard == "halves" and self.ddp:
            mix = lambda t: t.unflatten(0, (self.world, -1, bs // self.world)).transpose(0, 1).flatten(0, 2)
            xs, ys = mix(xs), mix(ys)
        for _ in range(self.epochs):
            for j in range(self.steps_per_epoch):
                xb, yb = (xs[j], ys[j]) if self.workload == "A" else (xs[j * bs:(j + 1) * bs], ys[j * bs:(j + 1) * bs])
                grads = torch.autograd.grad(self.loss_fn(model(xb), yb), ps)
                lr, mom = table[i]; i += 1
                with torch.no_grad():
                    for p, g, v in zip(ps, grads, vel):
                        if kind == "keras": v.mul_(mom).sub_(g, alpha=lr); p.add_(v)
                        else: v.mul_(mom).add_(g); p.sub_(v, alpha=lr)
        return self.final_loss(model)

    def final_loss(self, model=None):
        "Mean loss of the trained model over the whole training set, in evaluation mode."
        import torch
        model = self.model if model is None else model
        was = model.training
        model.eval()
        x = torch.cat(self.train_ds.xs) if self.workload == "A" else self.train_ds.xs
        y = torch.cat(self.train_ds.ys) if self.workload == "A" else self.train_ds.ys
        with torch.no_grad():
            tot = sum(torch.nn.functional.cross_entropy(model(xb), yb, reduction="sum").item()
                      for xb, yb in zip(x.split(2000), y.split(2000)))
        model.train(was)
        return tot / len(y)


def accuracy(out, y): return (out.argmax(1) == y).float().mean()
