"""Configurations that once failed, each with what it was. A failure that is mended comes here, in its smallest form."""

from __future__ import annotations

from tests.fuzz.configuration import Configuration, Interruption

AMID = Interruption(step=2)  # raised after the second step's batch, within the first epoch
ENDS = Interruption(hook="after_batch", step=3)
OVER = Interruption(hook="after_fit", step=1)

TWO = {"world": 2, "spread": "to_distributed"}
ON_TWO = (Interruption(kind="SIGTERM", step=1, world=2),)
FSDP = {"world": 2, "spread": "fsdp", "model": "MLP"}

REGRESSIONS: dict[str, Configuration] = {
    # within an epoch, on two or more ranks
    "a plain DataLoader, resumed within an epoch": Configuration(
        **TWO, source="DataLoader", n=36, global_bs=6, interruptions=ON_TWO
    ),
    "DataBunch.create, resumed within an epoch": Configuration(
        **TWO, source="create", n=36, global_bs=6, interruptions=ON_TWO
    ),
    "an own sampler, resumed within an epoch": Configuration(
        **TWO, source="own sampler", n=36, global_bs=6, interruptions=ON_TWO
    ),
    "an own batch sampler, resumed within an epoch": Configuration(
        **TWO, source="own batch_sampler", n=36, global_bs=6, interruptions=ON_TWO
    ),
    "a plain DataLoader, resumed on more ranks": Configuration(
        check="elsewhere",
        spread="to_distributed",
        source="DataLoader",
        n=36,
        global_bs=6,
        interruptions=(Interruption(kind="SIGTERM", step=1, world=3),),
    ),
    # from an epoch's end, a user's generator repeated the epoch before
    "a DataLoader's own generator, from an epoch's end": Configuration(
        source="DataLoader, own generator", epochs=3, checkpoint=(), interruptions=(ENDS,)
    ),
    "a RandomSampler's own generator, from an epoch's end": Configuration(
        source="RandomSampler, generator", epochs=3, checkpoint=(), interruptions=(ENDS,)
    ),
    "weights with a generator, from an epoch's end": Configuration(
        source="WeightedRandomSampler, generator", epochs=3, checkpoint=(), interruptions=(ENDS,)
    ),
    # ranks validated different models
    "batch norm after max_steps within an epoch": Configuration(
        check="worlds", **TWO, model="batch norm", valid="DataLoader", n=36, max_steps=2
    ),
    "batch norm after StopFit within an epoch": Configuration(
        check="worlds", **TWO, model="batch norm", valid="DataLoader", n=36, stop=("StopFit", 2)
    ),
    # a script of two fits
    "a second fit with an EarlyStopping of its own": Configuration(
        fits=("fit", "fit"),
        epochs=3,
        own_callbacks=("EarlyStopping('train_loss', patience=1, min_delta=0.05)",),
        interruptions=(Interruption(step=2, fit=2),),
    ),
    "RMSprop: fit, then fit_one_cycle": Configuration(
        optimizer="RMSprop", fits=("fit", "fit_one_cycle"), interruptions=(Interruption(step=1, fit=2),)
    ),
    # ranks with weights of their own
    "EMA, decentralized": Configuration(
        world=2,
        spread="decentralized",
        callbacks=("EMA(decay=0.8)",),
        valid="DataLoader",
        epochs=2,
        interruptions=ON_TWO,
    ),
    "Lookahead, decentralized": Configuration(
        world=2, spread="decentralized", callbacks=("Lookahead(k=2)",), epochs=2, interruptions=ON_TWO
    ),
    # weights in parts
    "to_fsdp, EMA, async_write": Configuration(
        **FSDP,
        callbacks=("EMA(decay=0.8)",),
        checkpoint=(("every_n_steps", 1), ("async_write", True)),
        interruptions=ON_TWO,
    ),
    "to_fsdp, Lookahead, async_write": Configuration(
        **FSDP,
        callbacks=("Lookahead(k=2)",),
        checkpoint=(("every_n_steps", 1), ("async_write", True)),
        interruptions=ON_TWO,
    ),
    "to_fsdp, EMA, batch norm": Configuration(
        world=2,
        spread="fsdp",
        model="batch norm",
        callbacks=("EMA(decay=0.8)",),
        valid="DataLoader",
        interruptions=ON_TWO,
    ),
    "to_fsdp, SWA, batch norm": Configuration(
        world=2,
        spread="fsdp",
        model="batch norm",
        callbacks=("SWA(start=0.0, update_bn=True)",),
        valid="DataLoader",
        epochs=2,
        interruptions=ON_TWO,
    ),
    "to_fsdp, Muon": Configuration(**FSDP, optimizer="Muon and AdamW", interruptions=ON_TWO),
    "to_fsdp, Adafactor": Configuration(**FSDP, optimizer="Adafactor", interruptions=ON_TWO),
    "to_fsdp, the largest gradient's norm": Configuration(
        world=3,
        spread="fsdp",
        model="transformer",
        callbacks=("ClipGradients(max_norm=0.1, norm_type=float('inf'))",),
        interruptions=ON_TWO,
    ),
    # nine steps of eight
    "SIGTERM at the last of max_steps": Configuration(
        max_steps=1, interruptions=(Interruption(kind="SIGTERM", step=1),)
    ),
    # on other numbers of ranks, sums in another order
    "resumed on three ranks": Configuration(
        world=3,
        spread="small buckets",
        model="blocks",
        epochs=2,
        n=36,
        interruptions=(Interruption(kind="SIGTERM", step=1, world=3),),
    ),
    "losses of a float64 model in another world": Configuration(check="worlds", **TWO, epochs=2, optimizer="AdamW"),
    # what an optimizer keeps
    "NAdam in float64": Configuration(optimizer="NAdam", epochs=2, interruptions=(AMID,)),
    "ASGD in float64": Configuration(optimizer="ASGD", epochs=2, interruptions=(AMID,)),
    "Adafactor resumed": Configuration(optimizer="Adafactor", epochs=2, interruptions=(AMID,)),
    # traces
    "lr_find before a fit, with a callback's own state": Configuration(
        check="traces", callbacks=("SecondOptimizer()",), between=(("lr_find", "before", 1),)
    ),
    "predict before a fit, with samples that are drawn": Configuration(
        check="traces", source="create, noisy", between=(("predict", "before", 1),)
    ),
    "one_batch before a fit, with samples that are drawn": Configuration(
        check="traces", source="create, noisy", between=(("one_batch", "before", 1),)
    ),
    "summary before a fit, with samples that are drawn": Configuration(
        check="traces", source="create, noisy", between=(("summary", "before", 1),)
    ),
    # evaluation
    "a valid_dl with a DistributedSampler": Configuration(check="worlds", **TWO, valid="DistributedSampler"),
    # found by this fuzzer
    "learn.values of a finished fit": Configuration(interruptions=(OVER,)),
    "each rank's ActivationStats": Configuration(
        **TWO, model="MLP", callbacks=("ActivationStats()",), interruptions=ON_TWO
    ),
    "a log's first row, after a fit that was interrupted before it": Configuration(
        callbacks=("JSONLogger('log.jsonl')",), n=36, interruptions=(AMID,)
    ),
    "signal to one rank after the last step": Configuration(
        **TWO, valid="DataLoader", interruptions=(Interruption(kind="SIGTERM", hook="after_fit", world=2),)
    ),
    "StopFit in the same batch as a signal": Configuration(
        stop=("StopFit", 1), n=36, interruptions=(Interruption(kind="SIGTERM", hook="before_forward", step=0),)
    ),
    "L-BFGS resumed": Configuration(optimizer="LBFGS", epochs=2, interruptions=(AMID,)),
    "weights that evaluation rewrites while async_write copies them": Configuration(
        valid="create",
        model="convolutions",
        optimizer="SGDScheduleFree",
        n=36,
        checkpoint=(("every_n_steps", 1), ("async_write", True)),
        interruptions=(Interruption(kind="SIGTERM", hook="after_step", step=3),),
    ),
    "a schedule-free optimizer resumed": Configuration(
        valid="create", optimizer="SGDScheduleFree", epochs=2, interruptions=(AMID,)
    ),
    "an exception after the last of max_steps": Configuration(
        valid="DataLoader", max_steps=1, interruptions=(Interruption(hook="before_validate"),)
    ),
    "each rank's optimizer state, of a fit that is over": Configuration(
        world=2,
        spread="local_sgd",
        model="MLP",
        optimizer="SGD, momentum",
        epochs=2,
        n=36,
        interruptions=(Interruption(kind="kill", hook="after_fit", world=2),),
    ),
    "a signal between two averages": Configuration(
        world=2, spread="decentralized", n=36, epochs=2, interruptions=(Interruption(kind="SIGTERM", step=4, world=2),)
    ),
    "StopEpoch, and SaveBest of a valid_loss that there is not": Configuration(
        check="traces",
        callbacks=("SaveBest('valid_loss', keep=2)",),
        valid="DataLoader",
        epochs=2,
        n=36,
        stop=("StopEpoch", 1),
    ),
    "to_fsdp, Accumulate, a loader without a length": Configuration(
        check="traces", world=2, spread="fsdp", source="IterableDataset", n=36, callbacks=("Accumulate(2)",)
    ),
    "a schedule-free optimizer, decentralized": Configuration(
        check="traces", world=2, spread="decentralized", optimizer="SGDScheduleFree", n=36
    ),
    "SaveBest after an epoch without a step": Configuration(
        check="traces", precision="fp16, overflows", callbacks=("SaveBest('train_loss')",), n=36
    ),
    "tied weights in a sharded checkpoint": Configuration(
        check="elsewhere",
        world=2,
        spread="fsdp",
        source="DataLoader, shuffle",
        model="tied",
        optimizer="Adam",
        epochs=3,
        n=30,
        checkpoint=(("every_n_steps", 3), ("sharded", True)),
        interruptions=(Interruption(kind="SIGTERM on all", hook="before_epoch", early=True, world=3),),
    ),
    "the row of an epoch before one that a signal interrupts within its first window": Configuration(
        callbacks=("CSVLogger('log.csv')", "Accumulate(3)"),
        epochs=2,
        interruptions=(Interruption(kind="SIGTERM", hook="before_train"),),
    ),
    "lr_find after a fit whose ranks averaged their weights": Configuration(
        check="traces", world=2, spread="local_sgd", between=(("lr_find", "after", 3),)
    ),
    "channels last, of weights that were averaged": Configuration(
        world=2,
        spread="local_sgd",
        valid="create",
        model="convolutions, batch norm",
        precision="channels last",
        epochs=2,
        checkpoint=(("every_n_epochs", None),),
        interruptions=(Interruption(kind="kill", hook="before_step", step=4, early=True, world=2),),
    ),
    "a schedule-free optimizer evaluated within an epoch": Configuration(
        check="traces",
        world=2,
        spread="to_distributed",
        optimizer="AdamWScheduleFree",
        valid="create",
        model="transformer",
        epochs=2,
        n=36,
        between=(("predict", "amid", 2), ("validate", "amid", 2)),
    ),
    "an overflow of the gradients that one rank has of its own": Configuration(
        world=2,
        spread="decentralized",
        source="DistributedSampler",
        valid="list of batches",
        model="MLP",
        precision="fp16, overflows",
        optimizer="NAdam",
        callbacks=("SWA(start=0.3)",),
        fits=("fit, slice", "fit"),
        epochs=3,
        n=29,
        global_bs=6,
        max_steps=4,
        metrics="accuracy",
        checkpoint=(("every_n_steps", 3), ("every_n_epochs", None)),
        interruptions=(Interruption(kind="SIGTERM", step=3, rank=1, fit=2, world=2),),
    ),
}
