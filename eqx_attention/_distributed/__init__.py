from .all_gather import AllGather as AllGather
from .auto import Auto as Auto
from .explain import explain_shards as explain_shards
from .layout import from_layout as from_layout, to_layout as to_layout
from .local import attention_over as attention_over, of_device as of_device
from .ring import Ring as Ring
from .sharding import (
    as_sharding as as_sharding,
    check_mesh as check_mesh,
    Sharding as Sharding,
    Shards as Shards,
    shards_of as shards_of,
)
from .table import check_name as check_name, MECHANISMS as MECHANISMS
from .ulysses import Ulysses as Ulysses
