"""One function per peer. Each takes a ready `Job` (job.py), builds its library's trainer, and returns `fit`,
a function of no arguments that does all the training the job asks for. Add a peer = add one function here.

    @peer("name", requires="what setup.sh installs into the peer's own venv",
          imports="the statement whose time workload C reports",
          schedule="torch"      # whose one-cycle formula it follows: torch | fastai2 | fastai1 | keras | learnkit  (job.table)
          ddp=True,             # also run in workload E ("halves": each rank takes one half of the data, in order)
          venv="other", baseline="other",   # only to share a venv, or to be compared with another raw loop
          startup=False)        # leave it out of workloads C and D

What a job offers: model, loss_fn, train_dl, valid_dl (None when bare), train_ds, valid_ds, batch_size, epochs,
steps_per_epoch, total_steps, lr, momentum, n_out, optimizer(), scheduler(opt) (None for constant LR), one_cycle_args(),
bare, schedule, ddp, world, rank, sharded(ds), tmp (a scratch folder). Libraries are imported inside the function.
"""
import os
from functools import partial

from job import accuracy

PEERS = {}
TORCH = "torch==2.15.*"
LEARNKIT = os.environ.get("LEARNKIT") or os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


class Peer:
    def __init__(self, name, fn, requires, imports, schedule, ddp, venv, baseline, env, note, startup):
        self.name, self.fn, self.requires, self.imports, self.schedule, self.ddp = name, fn, requires, imports, schedule, ddp
        self.venv, self.baseline, self.env, self.note = venv or name, baseline, env or {}, note
        self.startup = startup


def peer(name, requires="", imports="import torch", schedule="torch", ddp=False, venv=None, baseline="raw", env=None, note="", startup=True):
    def deco(fn):
        PEERS[name] = Peer(name, fn, requires, imports, schedule, ddp, venv, baseline, env, note, startup)
        return fn
    return deco


# ------------------------------------------------------------------ the baseline
@peer("raw", requires=f"{TORCH} numpy tqdm", ddp=True)
def raw(job):
    import torch
    model, loss_fn = job.model, job.loss_fn
    train_dl, valid_dl = job.train_dl, job.valid_dl
    if job.ddp:
        if not torch.distributed.is_initialized(): torch.distributed.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(model)
        train_dl, valid_dl = job.sharded(job.train_ds), job.sharded(job.valid_ds)
    opt = job.optimizer()
    sched = job.scheduler(opt)

    def fit_bare():
        model.train()
        for _ in range(job.epochs):
            for xb, yb in train_dl:
                loss = loss_fn(model(xb), yb)
                loss.backward()
                opt.step()
                opt.zero_grad()
                if sched: sched.step()

    def fit():
        from tqdm.auto import tqdm
        for epoch in range(job.epochs):
            model.train()
            train_loss = 0.
            for xb, yb in tqdm(train_dl, desc=f"epoch {epoch}", leave=False, disable=job.rank > 0):
                loss = loss_fn(model(xb), yb)
                loss.backward()
                opt.step()
                opt.zero_grad()
                if sched: sched.step()
                train_loss += loss.detach()
            model.eval()
            tot = torch.zeros(3)
            with torch.no_grad():
                for xb, yb in valid_dl:
                    out = model(xb)
                    n = len(yb)
                    tot += torch.stack([loss_fn(out, yb) * n, (out.argmax(1) == yb).sum(), torch.tensor(float(n))])
            if job.ddp: torch.distributed.all_reduce(tot)
            if job.rank == 0:
                print(f"{epoch} {train_loss.item() / len(train_dl):.4f} {tot[0] / tot[2]:.4f} {tot[1] / tot[2]:.4f}")
    return fit_bare if job.bare else fit


@peer("raw-again", venv="raw", ddp=True, startup=False)   # the control: how far two runs of the very same loop are apart
def raw_again(job): return raw(job)


# ------------------------------------------------------------------ fastai
@peer("fastai", requires=f"{TORCH} fastai==2.8.* accelerate==1.15.*", imports="from fastai.vision.all import *", schedule="fastai2",
      ddp="halves", note="workload E runs with a patch: fastai's DistributedDL._broadcast calls .cuda(), so it cannot work on CPU as it is")
def fastai(job, own_optimizer=False):
    import torch
    from fastai.basics import DataLoaders, Learner, OptimWrapper, Recorder
    from fastai.callback.all import ProgressCallback
    from fastai.metrics import accuracy
    opt_func = partial(OptimWrapper, opt=torch.optim.SGD, momentum=job.momentum)
    if own_optimizer: from fastai.optimizer import SGD; opt_func = partial(SGD, mom=job.momentum)
    dls = DataLoaders(job.train_dl, [] if job.bare else job.valid_dl)
    learn = Learner(dls, job.model, loss_func=job.loss_fn, opt_func=opt_func, lr=job.lr,
                    metrics=[] if job.bare else accuracy)
    if job.bare: learn.remove_cbs([ProgressCallback, Recorder])

    def fit():
        if job.schedule == "onecycle": learn.fit_one_cycle(job.epochs, job.lr)
        else: learn.fit(job.epochs, job.lr)
    if not job.ddp: return fit

    import fastai.distributed as fd
    def _broadcast(self, t, rank):   # the stock one moves the indices to a GPU, even on gloo
        t = torch.LongTensor(t)
        torch.distributed.broadcast(t, rank)
        return t.tolist()
    fd.DistributedDL._broadcast = _broadcast
    def fit_ddp():
        with learn.distrib_ctx(sync_bn=False, cpu=True): fit()
    return fit_ddp


@peer("fastai-own-sgd", venv="fastai", imports="from fastai.vision.all import *", schedule="fastai2", note="fastai with its own SGD instead of torch's", startup=False)
def fastai_own_sgd(job): return fastai(job, own_optimizer=True)


# ------------------------------------------------------------------ Lightning
@peer("lightning", requires=f"{TORCH} lightning==2.6.*", imports="import lightning as L", ddp=True)
def lightning(job):
    import lightning as L
    from torchmetrics.classification import MulticlassAccuracy

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.loss_fn = job.model, job.loss_fn
            if not job.bare: self.acc = MulticlassAccuracy(job.n_out, average="micro")
        def training_step(self, batch, i):
            x, y = batch
            loss = self.loss_fn(self.model(x), y)
            if not job.bare: self.log("train_loss", loss, prog_bar=True)
            return loss
        def configure_optimizers(self):
            opt = job.optimizer()
            sched = job.scheduler(opt)
            return {"optimizer": opt, "lr_scheduler": {"scheduler": sched, "interval": "step"}} if sched else opt
    class Validating(Module):
        def validation_step(self, batch, i):
            x, y = batch
            out = self.model(x)
            self.acc(out, y)
            self.log("valid_loss", self.loss_fn(out, y), prog_bar=True, sync_dist=job.ddp)
            self.log("accuracy", self.acc, prog_bar=True)

    kw = dict(max_epochs=job.epochs, accelerator="cpu", devices=job.world, default_root_dir=job.tmp)
    if job.ddp:   # Lightning would shard by itself too, but its training sampler always shuffles
        kw.update(strategy="ddp", use_distributed_sampler=False)
        train_dl, valid_dl = job.sharded(job.train_ds), job.sharded(job.valid_ds)
    else: train_dl, valid_dl = job.train_dl, job.valid_dl
    if job.bare:   # Lightning's own switch for measuring the loop itself
        trainer, module = L.Trainer(barebones=True, **kw), Module()
        return lambda: trainer.fit(module, train_dl)
    trainer, module = L.Trainer(**kw), Validating()
    return lambda: trainer.fit(module, train_dl, valid_dl)


# ------------------------------------------------------------------ Accelerate
@peer("accelerate", requires=f"{TORCH} accelerate==1.15.* tqdm", imports="from accelerate import Accelerator", ddp=True)
def accelerate(job):
    import torch
    from accelerate import Accelerator
    acc = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    opt = job.optimizer()
    sched = job.scheduler(opt)
    loss_fn = job.loss_fn
    model, opt, train_dl = acc.prepare(job.model, opt, job.train_dl)
    if sched: sched = acc.prepare(sched)
    valid_dl = acc.prepare(job.valid_dl) if job.valid_dl is not None else None

    def fit_bare():
        model.train()
        for _ in range(job.epochs):
            for xb, yb in train_dl:
                loss = loss_fn(model(xb), yb)
                acc.backward(loss)
                opt.step()
                opt.zero_grad()
                if sched: sched.step()

    def fit():
        from tqdm.auto import tqdm
        for epoch in range(job.epochs):
            model.train()
            train_loss = 0.
            for xb, yb in tqdm(train_dl, desc=f"epoch {epoch}", leave=False, disable=not acc.is_local_main_process):
                loss = loss_fn(model(xb), yb)
                acc.backward(loss)
                opt.step()
                opt.zero_grad()
                if sched: sched.step()
                train_loss += loss.detach()
            model.eval()
            loss_sum, correct, n = 0., 0, 0
            with torch.no_grad():
                for xb, yb in valid_dl:
                    out, yb = acc.gather_for_metrics((model(xb), yb))
                    loss_sum += loss_fn(out, yb) * len(yb)
                    correct += (out.argmax(1) == yb).sum()
                    n += len(yb)
            acc.print(f"{epoch} {train_loss.item() / len(train_dl):.4f} {loss_sum / n:.4f} {correct / n:.4f}")
    return fit_bare if job.bare else fit


# ------------------------------------------------------------------ Ignite
@peer("ignite", requires=f"{TORCH} numpy pytorch-ignite==0.5.* tqdm",
      imports="from ignite.engine import Events, create_supervised_trainer, create_supervised_evaluator; "
              "from ignite.metrics import Accuracy, Loss; from ignite.handlers import ProgressBar", ddp=True)
def ignite(job):
    import ignite.distributed as idist
    from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
    from ignite.handlers import ProgressBar
    from ignite.metrics import Accuracy, Loss
    model, train_dl, valid_dl, opt = job.model, job.train_dl, job.valid_dl, job.optimizer()
    if job.ddp:
        if idist.backend() is None: idist.initialize("gloo")
        model = idist.auto_model(model)
        train_dl, valid_dl = (idist.auto_dataloader(ds, batch_size=job.global_batch, shuffle=False) for ds in (job.train_ds, job.valid_ds))
    sched = job.scheduler(opt)
    trainer = create_supervised_trainer(model, opt, job.loss_fn)
    if sched: trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: sched.step())
    if not job.bare:
        evaluator = create_supervised_evaluator(model, metrics={"accuracy": Accuracy(), "loss": Loss(job.loss_fn)})
        if job.rank == 0: ProgressBar().attach(trainer, output_transform=lambda loss: {"loss": loss})
        @trainer.on(Events.EPOCH_COMPLETED)
        def validate(engine):
            m = evaluator.run(valid_dl).metrics
            if job.rank == 0: print(f"{engine.state.epoch} {engine.state.output:.4f} {m['loss']:.4f} {m['accuracy']:.4f}")
    return lambda: trainer.run(train_dl, max_epochs=job.epochs)


# ------------------------------------------------------------------ Keras 3
@peer("keras", requires=f"{TORCH} keras==3.*", imports="import keras", schedule="keras", env={"KERAS_BACKEND": "torch"})
def keras(job):
    import keras
    lr = job.lr
    if job.schedule == "onecycle":
        table = [lr for lr, _ in job.table("keras")]
        class OneCycle(keras.optimizers.schedules.LearningRateSchedule):
            def __call__(self, step): return table[min(int(step), len(table) - 1)]
        lr = OneCycle()
    model = keras.Sequential([keras.layers.TorchModuleWrapper(job.model)])
    model.compile(optimizer=keras.optimizers.SGD(lr, momentum=job.momentum),
                  loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                  metrics=[] if job.bare else ["accuracy"])
    if job.bare: return lambda: model.fit(job.train_dl, epochs=job.epochs, verbose=0)
    return lambda: model.fit(job.train_dl, epochs=job.epochs, validation_data=job.valid_dl)


# ------------------------------------------------------------------ skorch
@peer("skorch", requires=f"{TORCH} skorch", imports="from skorch import NeuralNetClassifier")
def skorch(job):
    import torch
    from skorch import NeuralNetClassifier
    from skorch.callbacks import LRScheduler
    from skorch.helper import predefined_split
    cbs, off = [], {}
    if job.schedule == "onecycle":
        cbs = [("lr", LRScheduler(torch.optim.lr_scheduler.OneCycleLR, step_every="batch", **job.one_cycle_args()))]
    if job.bare:
        off = {f"callbacks__{k}": None for k in ("epoch_timer", "train_loss", "valid_loss", "valid_acc", "print_log")}
    net = NeuralNetClassifier(
        job.model, criterion=torch.nn.CrossEntropyLoss, optimizer=torch.optim.SGD, lr=job.lr, optimizer__momentum=job.momentum,
        max_epochs=job.epochs, batch_size=job.batch_size, classes=list(range(job.n_out)), callbacks=cbs,
        iterator_train=lambda ds, **kw: job.train_dl, iterator_valid=lambda ds, **kw: job.valid_dl,
        train_split=None if job.bare else predefined_split(job.valid_ds), verbose=0 if job.bare else 1, **off)
    return lambda: net.fit(job.train_ds, y=None)


# ------------------------------------------------------------------ pytorch-accelerated
@peer("pytorch-accelerated", requires=f"{TORCH} pytorch-accelerated torchmetrics", imports="from pytorch_accelerated import Trainer")
def pytorch_accelerated(job):
    import torch
    from pytorch_accelerated import Trainer
    from pytorch_accelerated.callbacks import TrainerCallback
    from pytorch_accelerated.trainer import DEFAULT_CALLBACKS
    from torchmetrics.classification import MulticlassAccuracy

    class Accuracy(TrainerCallback):
        def __init__(self): self.acc = MulticlassAccuracy(job.n_out, average="micro")
        def on_eval_step_end(self, trainer, batch, batch_output, **kw): self.acc.update(batch_output["model_outputs"], batch[1])
        def on_eval_epoch_end(self, trainer, **kw):
            trainer.run_history.update_metric("accuracy", self.acc.compute().item())
            self.acc.reset()
    cbs = () if job.bare else (Accuracy, *DEFAULT_CALLBACKS)
    trainer = Trainer(job.model, job.loss_fn, job.optimizer(), callbacks=cbs)
    kw = dict(num_workers=0, shuffle=False, batch_size=job.batch_size or 1)   # it needs a batch sampler, so A's ready batches come one by one
    collate = None if job.batch_size else lambda items: items[0]
    sched = partial(torch.optim.lr_scheduler.OneCycleLR, **job.one_cycle_args()) if job.schedule == "onecycle" else None
    return lambda: trainer.train(job.train_ds, job.epochs, eval_dataset=None if job.bare else job.valid_ds,
                                 per_device_batch_size=job.batch_size or job.global_batch, create_scheduler_fn=sched,
                                 train_dataloader_kwargs=kw, eval_dataloader_kwargs=kw, collate_fn=collate)


# ------------------------------------------------------------------ poutyne
@peer("poutyne", requires=f"{TORCH} poutyne", imports="from poutyne import Model")
def poutyne(job):
    from poutyne import Callback, Model
    opt = job.optimizer()
    sched, cbs = job.scheduler(opt), []
    if sched:   # poutyne's own scheduler callbacks step once an epoch
        class StepLR(Callback):
            def on_train_batch_end(self, batch_number, logs): sched.step()
        cbs = [StepLR()]
    model = Model(job.model, opt, job.loss_fn, batch_metrics=[] if job.bare else ["accuracy"])
    return lambda: model.fit_generator(job.train_dl, job.valid_dl, epochs=job.epochs, callbacks=cbs, verbose=not job.bare)


# ------------------------------------------------------------------ Composer: takes torch 2.7.0 at most, so its own raw loop too
@peer("raw-composer", venv="composer", baseline=None)
def raw_composer(job): return raw(job)


@peer("composer", requires="mosaicml==0.32.* torch==2.7.0", imports="from composer import Trainer", baseline="raw-composer",
      note="torch 2.7.0; compared with a raw loop on that torch")
def composer(job):
    from composer import Evaluator, Trainer
    from composer.models import ComposerClassifier
    loss_fn = lambda out, y: job.loss_fn(out, y)
    class Classifier(ComposerClassifier):
        if job.bare:
            def get_metrics(self, is_train=False): return {}
    model = Classifier(job.model, num_classes=job.n_out, loss_fn=loss_fn)
    opt = job.optimizer()
    evaluator = None if job.bare else Evaluator(label="eval", dataloader=job.valid_dl, device_eval_microbatch_size=job.global_batch)
    trainer = Trainer(model=model, train_dataloader=job.train_dl, eval_dataloader=evaluator, max_duration=f"{job.epochs}ep",
                      optimizers=opt, schedulers=job.scheduler(opt), step_schedulers_every_batch=True, device="cpu",
                      progress_bar=not job.bare, device_train_microbatch_size=job.global_batch)
    def fit():
        trainer.fit()
        trainer.close()
    return fit


# ------------------------------------------------------------------ learnkit: the tree that LEARNKIT names, by default this one
@peer("learnkit", requires=f"{TORCH} -e {LEARNKIT}", imports="from learnkit import Learner", schedule="learnkit",
      ddp=True, note="this tree; the name on the package index is another project's")
def learnkit(job):
    import torch
    from learnkit import DataBunch, Learner, accuracy
    from learnkit.callbacks import Progress, Recorder
    learn = Learner(DataBunch(job.train_dl, job.valid_dl), job.model, loss_func=job.loss_fn, wd=0.,
                    opt_func=partial(torch.optim.SGD, momentum=job.momentum), metrics=() if job.bare else accuracy)
    if job.bare: learn.remove_callback(Progress).remove_callback(Recorder)
    if job.ddp: learn.to_distributed()

    def fit():
        if job.schedule == "onecycle": learn.fit_one_cycle(job.epochs, job.lr)
        else: learn.fit(job.epochs, job.lr)
    return fit
