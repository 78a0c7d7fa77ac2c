"""Right implementations in the many styles people use; the checker must pass them all.

One is registered by `@right(checker, **options)`, a class to be built without arguments
or a function.
"""

from collections.abc import Callable
from typing import Any

STYLES: list[tuple[str, Callable[[], Any], dict[str, Any]]] = []


def right(checker: str, **options: Any) -> Callable[[Any], Any]:
    """Register a function, or a class that is built without arguments."""

    def register(fine: Any) -> Any:
        make = fine if isinstance(fine, type) else lambda: fine
        STYLES.append((checker, make, options))
        return fine

    return register


from . import attentions, layers, transformers, vits  # noqa: E402, F401
