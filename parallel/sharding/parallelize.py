"""`parallelize(network, config)`: everything that shards a network; the model's own code stays untouched.

Layouts come from the layers (`parallel.sharding.layout`); this adds pipeline stages, recomputation, gradient fusion and
the sharing of parameters between stages. A network may declare more about itself than that it is a cell:

    pipeline_cells() -> [before, layer, layer, ..., after]: cells in the order of the forward pass; each may be a list,
        in which a layer comes first and what it alone needs follows
    shared_parameters() -> [(parameter, [cell, cell])]: parameters that cells on several stages use
"""

from __future__ import annotations

from mindspore import nn

from parallel.common.errors import UserError
from parallel.sharding.config import ParallelConfig
from parallel.sharding.layout import apply_sharding
from parallel.sharding.trainable import pipeline_units, shared_parameters

_MANY_STAGES_GROUP = 2


def parallelize(network: nn.Cell, config: ParallelConfig) -> nn.Cell:
    """Shards `network` in place by `config` (resolved) and returns it.

    Raises:
        UserError: stages are asked of a network that does not say how its cells follow each other, or layers and
            offsets do not fit.
    """
    apply_sharding(network, config)
    place_on_stages(network, config)
    fuse_gradients(network, config)
    recompute(network, config)
    return network


def stage_of_layers(layers: int, config: ParallelConfig) -> list[tuple[int, int]]:
    """(stage, chunk) of every layer: even shares in order, the remainder to the earlier chunks, then `offsets`.

    Under the interleaved schedule chunk k of stage s holds the (k * stages + s)-th share of the layers.

    Raises:
        UserError: a share is left without layers.
    """
    stages, chunks = config.pipeline.stages, config.pipeline.interleave
    shares = [layers // (stages * chunks) + (i < layers % (stages * chunks)) for i in range(stages * chunks)]
    for stage, offset in enumerate(config.pipeline.offsets or []):
        shares[stage] += offset
    if min(shares) < 1:
        raise UserError(f"{layers} layers leave a stage without a layer", where="parallel.pipeline",
                        value=shares, hint="use fewer stages, less interleave or other offsets")
    return [(i % stages, i // stages) for i, share in enumerate(shares) for _ in range(share)]


def has_stack(network: nn.Cell) -> bool:
    """Whether the network says how its cells follow each other (`Trainable.pipeline_cells`)."""
    return pipeline_units(network) is not None


def layers_of_stages(network: nn.Cell, config: ParallelConfig) -> list[int]:
    """Number of layers on each stage; one entry, 0, for a network without a stack of layers."""
    units = pipeline_units(network)
    if units is None:
        return [0]
    stages = stage_of_layers(len(units) - 2, config)
    return [sum(assigned[0] == stage for assigned in stages) for stage in range(config.pipeline.stages)]


def place_on_stages(network: nn.Cell, config: ParallelConfig) -> None:
    """Gives cells their pipeline stage; what comes before the layers goes to the first, what follows to the last."""
    if config.pipeline.stages == 1:
        return
    before, *layers, after = _units(network)
    stages = stage_of_layers(len(layers), config)
    for unit, (stage, chunk) in zip([before, *layers, after], [stages[0], *stages, stages[-1]], strict=True):
        for cell in unit:
            cell.pipeline_stage = stage
            if config.pipeline.interleave > 1:
                cell.pipeline_segment = chunk
    for parameter, cells in shared_parameters(network):
        for cell in cells:
            parameter.add_pipeline_stage(cell.pipeline_stage)


def fuse_gradients(network: nn.Cell, config: ParallelConfig) -> None:
    """Numbers the groups whose gradient communication is fused into one call: 1 for what comes before the layers, then
    `gradient_fusion_groups` groups of layers; under pipeline all layers are one group (PanGu-alpha code)."""
    if not has_stack(network):
        return
    before, *layers, after = _units(network)
    groups = min(config.gradient_fusion_groups, len(layers))
    numbers = [_MANY_STAGES_GROUP + (0 if config.pipeline.stages > 1 else i * groups // len(layers))
               for i in range(len(layers))]
    for unit, number in zip([before, *layers, after], [1, *numbers, numbers[-1]], strict=True):
        for cell in unit:
            for parameter in cell.get_parameters():
                parameter.comm_fusion = number


def recompute(network: nn.Cell, config: ParallelConfig) -> None:
    """Marks what is computed again in the backward pass: each layer (full) or the named cells in it (selective).

    Raises:
        UserError: a name fits no cell, or the network has no layers.
    """
    settings = config.recompute
    if settings.policy == "none":
        return
    if not has_stack(network):
        raise UserError("this model has no stack of layers to compute again", where="parallel.recompute.policy",
                        value=settings.policy, hint="set it to none")
    _, *units, _ = _units(network)
    layers = [unit[0] for unit in units]
    how = {"mp_comm_recompute": settings.communication, "recompute_slice_activation": settings.slice_activations}
    for layer in layers:
        if settings.policy == "full":
            layer.recompute(**how)
            continue
        cells = dict(layer.cells_and_names())
        for name in settings.cells:
            if name not in cells:
                raise UserError("no such cell in a layer", where="parallel.recompute.cells", value=name,
                                hint=f"known: {', '.join(key for key in cells if key)}")
            cells[name].recompute(**how)


def _units(network: nn.Cell) -> list[list[nn.Cell]]:
    units = pipeline_units(network)
    if units is None:
        raise UserError("this model does not say how its cells follow each other, so it has no stages and no layers to "
                        "recompute", where="parallel", value=type(network).__name__,
                        hint="give it pipeline_cells(), or set pipeline.stages: 1 and recompute.policy: none")
    return units
