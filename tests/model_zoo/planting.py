"""Makes a `ModelFault` for each layer of a network that one mistake is planted in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from tests.model_zoo.base import EVERY_DTYPE, ModelFault, Operation
from tests.model_zoo.layers import plant

Maker = Callable[[], Operation]


def always(function: Operation) -> Maker:
    """A maker of a function without any state of its own."""
    return lambda: function


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where faults go in one network: the module that "early", "middle" and "late" stand for, and the network."""

    network: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    layers: Mapping[str, int]

    def faults(
        self,
        kind: str,
        module: str,
        operation: str,
        wrong: Maker,
        codes: str,
        sizes: float | tuple[float, ...],
        *,
        layers: str = "early middle late",
        right: Operation | None = None,
        **options: Any,
    ) -> list[ModelFault]:
        """The operation of a module replaced in each layer, whose number goes into `module`.

        `right` is what the reference has there where that is not the network's own.
        """
        names = layers.split()
        size = sizes if isinstance(sizes, tuple) else (sizes,) * len(names)

        def change(network: nn.Module, module: str, make: Maker) -> None:
            plant(network, module, operation, make())

        found = []
        for layer, relative in zip(names, size, strict=True):
            path = module.format(self.layers[layer])
            reference = None if right is None else partial(change, module=path, make=always(right))
            found.append(
                self.fault(
                    kind,
                    layer,
                    path,
                    partial(change, module=path, make=wrong),
                    wrong().__name__,
                    codes,
                    relative,
                    reference=reference,
                    **options,
                )
            )
        return found

    def between(
        self,
        kind: str,
        wrong: Maker,
        codes: str,
        sizes: float | tuple[float, ...],
        *,
        layers: str = "early middle",
        right: Operation | None = None,
        **options: Any,
    ) -> list[ModelFault]:
        """A call in the model's own forward, after each of these layers."""
        names = layers.split()
        size = sizes if isinstance(sizes, tuple) else (sizes,) * len(names)

        def change(network: nn.Module, layer: str, make: Maker) -> None:
            plant(network, "", "between", make())
            plant(network, "", "after", self.layers[layer])

        return [
            self.fault(
                kind,
                layer,
                "",
                partial(change, layer=layer, make=wrong),
                wrong().__name__,
                codes,
                relative,
                reference=None if right is None else partial(change, layer=layer, make=always(right)),
                **options,
            )
            for layer, relative in zip(names, size, strict=True)
        ]

    def fault(
        self,
        kind: str,
        layer: str,
        module: str,
        change: Callable[[nn.Module], object],
        place: str,
        codes: str,
        size: float,
        *,
        reference: Callable[[nn.Module], object] | None = None,
        inputs: Callable[[], tuple[Tensor, ...]] | None = None,
        also: tuple[str, ...] = (),
        dtypes: tuple[Any, ...] = EVERY_DTYPE,
        train_only: bool = False,
        eval_only: bool = False,
    ) -> ModelFault:
        """A network of this site that `change` was done to."""

        def made(change: Callable[[nn.Module], object]) -> nn.Module:
            network = self.build()
            change(network)
            return network

        return ModelFault(
            name=f"{self.network}: {kind}, {layer}",
            kind=kind,
            network=self.network,
            layer=layer,
            make=partial(made, change),
            reference=self.build if reference is None else partial(made, reference),
            inputs=self.inputs if inputs is None else inputs,
            module=module,
            also=also,
            place=place,
            codes=frozenset(codes.split()),
            train_only=train_only,
            eval_only=eval_only,
            dtypes=dtypes,
            relative_size=size,
        )


def scaling_backward_hook(factor: float) -> Callable[..., tuple[Tensor | None, ...]]:
    """For `register_full_backward_hook`: the gradient of a module's inputs times the factor."""

    def scaling_backward_hook(
        module: nn.Module, inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        return tuple(None if one is None else factor * one for one in inputs)

    return scaling_backward_hook


def scaling_parameter_hook(factor: float) -> Callable[[Tensor], Tensor]:
    def scaling_parameter_hook(gradient: Tensor) -> Tensor:
        return factor * gradient

    return scaling_parameter_hook


def hook_on_module(network: nn.Module, module: str, factor: float) -> None:
    network.get_submodule(module).register_full_backward_hook(scaling_backward_hook(factor))


def hook_on_parameter(network: nn.Module, module: str, parameter: str, factor: float) -> None:
    holder = network.get_submodule(module).get_parameter(parameter)
    holder.register_hook(scaling_parameter_hook(factor))  # type: ignore[no-untyped-call]  # torch's own


def plant_all(network: nn.Module, modules: tuple[str, ...], operation: str, make: Maker) -> None:
    """One and the same function in several modules."""
    function = make()
    for module in modules:
        plant(network, module, operation, function)
