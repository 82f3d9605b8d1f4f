from .base import AbstractCache as AbstractCache
from .static import StaticCache as StaticCache
