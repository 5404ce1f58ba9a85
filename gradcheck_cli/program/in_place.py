"""Notices operations that overwrite a tensor."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class InPlaceWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives no types for it
    """While active, `seen` becomes true when an operation overwrites one of its operands."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would import its whole compiler (1 s) to keep it out of here, and wrap every operation."""
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.seen = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass the operation on and remember whether it writes."""
        self.seen = self.seen or func._schema.is_mutable
        return func(*args, **(kwargs or {}))
