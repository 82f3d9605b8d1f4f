"""What the command line and the plots need besides, if it is installed."""

import importlib
import types


def needed(module: str, what: str) -> types.ModuleType:
    """Imports a module of the extra `benchmark`.

    **Raises:** `ImportError` if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise ImportError(
            f"{what} needs {error.name}, which is not installed: "
            "`pip install '.[benchmark]'` in a clone of eqx_attention."
        ) from None
