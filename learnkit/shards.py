"""For callbacks of your own that keep tensors under `to_fsdp`, see learnkit.devices.dtensor."""

from learnkit.devices.dtensor import is_shard as is_shard
from learnkit.devices.dtensor import like as like
from learnkit.devices.dtensor import own_part as own_part
from learnkit.devices.dtensor import whole as whole
