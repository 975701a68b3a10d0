"""How a Learner comes to its processes, and what its precision is."""

from __future__ import annotations

import torch

from tests.fuzz.part import Part, part


def own_hook(state, bucket):  # type: ignore[no-untyped-def]
    """A communication hook of the user's own: the mean of all gradients. (torch refuses annotations that are
    strings.)
    """
    world = torch.distributed.get_world_size()
    work = torch.distributed.all_reduce(bucket.buffer().div_(world), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


# exact       the gradients are those of one process, but for the order of sums
# fsdp        each rank has its part of the model
# float32     it rounds to less, so float64 would show nothing
# unused      takes parameters without a gradient
SPREADS: dict[str, Part] = {
    "alone": part("", "exact", "unused", weight=4),
    "to_distributed": part(".to_distributed(hang_timeout=60)", "exact", weight=6),
    "sync_bn": part(".to_distributed(sync_bn=True, hang_timeout=60)", "exact", "sync_bn", weight=2),
    "delay_allreduce": part(".to_distributed(delay_allreduce=True, hang_timeout=60)", "exact", "unused", weight=2),
    "find_unused_parameters": part(".to_distributed(find_unused_parameters=True, hang_timeout=60)", "exact", "unused"),
    "static_graph": part(
        ".to_distributed(static_graph=True, hang_timeout=60)", "exact", "static", "unused", weight=0.7
    ),
    "small buckets": part(
        ".to_distributed(bucket_cap_mb=1e-5, gradient_as_bucket_view=True, hang_timeout=60)", "exact", "buckets"
    ),
    "allreduce": part(".to_distributed(algorithm='allreduce', hang_timeout=60)", "exact", weight=0.5),
    "fp16": part(".to_distributed(algorithm='fp16', hang_timeout=60)", "float32", weight=0.7),
    "bf16": part(".to_distributed(algorithm='bf16', hang_timeout=60)", "float32", weight=0.7),
    "powersgd": part(
        ".to_distributed(algorithm='powersgd', rank=1, warmup_steps=2, hang_timeout=60)", "float32", weight=1.5
    ),
    "bytegrad": part(".to_distributed(algorithm='bytegrad', hang_timeout=60)", "float32", weight=0.7),
    "local_sgd": part(
        ".to_distributed(algorithm='local_sgd', period=3, warmup_steps=2, hang_timeout=60)", "own weights", weight=1.5
    ),
    "hierarchical": part(
        ".to_distributed(algorithm='hierarchical', period=2, warmup_steps=1, hang_timeout=60)", "own weights"
    ),
    "decentralized": part(
        ".to_distributed(algorithm='decentralized', period=3, hang_timeout=60)", "own weights", weight=1.5
    ),
    "own hook": part(".to_distributed(algorithm=own_hook, hang_timeout=60)", "exact", weight=0.7),
    "fsdp": part(".to_fsdp(hang_timeout=60)", "exact", "fsdp", weight=2.5),
    "fsdp, blocks": part(".to_fsdp(blocks=Residual, hang_timeout=60)", "exact", "fsdp", "blocks"),
    "fsdp, checkpointing": part(
        ".to_fsdp(blocks=Residual, activation_checkpointing=True, hang_timeout=60)", "exact", "fsdp", "blocks"
    ),
    "fsdp, offload": part(".to_fsdp(cpu_offload=True, hang_timeout=60)", "exact", "fsdp", weight=0.7),
    "fsdp, bf16": part(".to_fsdp(mixed_precision=torch.bfloat16, hang_timeout=60)", "fsdp", "float32", weight=0.7),
}

# half        computed in less: float32 weights, and no equality with another world
PRECISIONS: dict[str, Part] = {
    "": part("", weight=12),
    "bf16": part(".to_bf16()", "half"),
    "bf16, pure": part(".to_bf16(pure=True)", "half", "pure"),
    "fp16": part(".to_fp16(init_scale=1024.0, growth_interval=3)", "half", "float16"),
    "fp16, overflows": part(".to_fp16(init_scale=2.0**40)", "half", "float16", "skips", weight=0.5),
    "fp16, pure": part(".to_fp16(pure=True, init_scale=256.0)", "half", "float16", "pure", weight=0.5),
    "channels last": part(".to_channels_last()", "pictures"),
    "compiled": part(".compile(backend='eager')", "compiled", weight=0.4),
    "compiled, dynamic": part(".compile(backend='eager', dynamic=True)", "compiled", weight=0.1),
}
