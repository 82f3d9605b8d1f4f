from .base import AbstractCache as AbstractCache, of_last_token as of_last_token
from .paged import PagedCache as PagedCache
from .quantized import QuantizedCache as QuantizedCache
from .rolling import RollingCache as RollingCache
from .static import StaticCache as StaticCache
