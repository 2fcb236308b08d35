"""Engines: what runs a frozen network."""

from __future__ import annotations

import copy
import ctypes
import functools
import itertools
import logging
import math
import operator
import warnings
from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.optimization import fuse
from torch.nn import functional

from .folding import fold_stem

Runner = Callable[[Tensor], Tensor]

FEW_PIXELS = 4  # of a map; with more of them the linear map's weights take longer to read than they save
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names and numbers of glibc's malloc.h


def prepare(network: nn.Module, engine: str, example: Tensor) -> Runner:
    """Make a frozen network ready to run. On a CPU the process keeps its memory from now on, see `keep_memory`.

    Args:
        network: uint8 images (B, 3, H, W) to float32 latents; stays untouched.
        engine: `eager` (PyTorch, channels-last, batch norms folded into their convolutions, whose weights are laid
            out once for oneDNN on a CPU, with the additions and ReLUs behind them; the first convolution in blocks of
            pixels on a GPU) or `onnxruntime` (float32, on the CPU, as many threads as PyTorch has).
        example: uint8 images of the size and on the device of use.

    Returns:
        A function from uint8 images to latents on the same device, for any batch size.
    """
    if example.device.type == "cpu":
        keep_memory()
    if engine == "eager":
        return _eager(network, example)
    return _onnxruntime(network, example)


@functools.cache
def keep_memory() -> None:
    """Have the C library keep freed memory for the next pass instead of giving it back to the system.

    By default glibc asks the system for each large map of the first layers and gives it back after use, and the system
    clears it page by page (book, *Memory is kept between passes*). Elsewhere than in glibc nothing is done.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)  # glibc before 2.35 refuses more than 32 MB
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _eager(network: nn.Module, example: Tensor) -> Runner:
    if not len(list(network.children())):
        return network  # full training: there is no prefix
    if any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        parts = [(kind, nn.Sequential(*run)) for kind, run in itertools.groupby(network.children(), key=_untraceable)]
        frozen = nn.Sequential(*[run if untraceable else fuse(run) for untraceable, run in parts])
    else:
        frozen = copy.deepcopy(network)
    frozen = frozen.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    if example.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return _PackedRunner(frozen, len(example))
    if example.device.type == "cuda":
        fold_stem(frozen)
    return torch.inference_mode()(frozen.forward)


class _PackedRunner:
    """Runs a network with packed convolutions; as it is, with a warning, where this PyTorch refuses them.

    PyTorch 2.11, for one, refuses an addition behind a convolution where maps have come down to a single pixel. Other
    builds may lack an operator. The first pass tells.

    Args:
        frozen: blocks traced by torch.fx, and others.
        batch_size: images of a pass, for which weights are laid out.
    """

    def __init__(self, frozen: nn.Sequential, batch_size: int) -> None:
        # the same layers in graphs of their own
        parts = [GraphModule(part, copy.deepcopy(part.graph)) if isinstance(part, GraphModule) else part
                 for part in frozen]
        for part in parts:
            if isinstance(part, GraphModule):
                _pack_convolutions(part, batch_size)
        self.network, self.unpacked = nn.Sequential(*parts), frozen

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        if self.unpacked is None:
            return self.network(images)
        try:
            latents = self.network(images)
        except (RuntimeError, AttributeError) as error:
            warnings.warn(
                f"PyTorch {torch.__version__} refuses this network's packed convolutions ({error}): it runs without "
                "them, which is slower", stacklevel=3,  # who called this
            )
            self.network = self.unpacked
            latents = self.network(images)
        self.unpacked = None
        return latents


class _PackedConvolution(nn.Module):
    """A convolution, an addition and the ReLU behind it, as one call of oneDNN on weights laid out for it once.

    PyTorch lays the weights out anew in every call, a cost that does not shrink with the image, and goes through the
    maps once more for each addition and ReLU. A convolution of single pixels is called as the linear map of channels
    that it is: oneDNN takes less time to begin that, which counts where maps are small. A larger kernel on a map of few
    pixels lies on the padding for the most part: it is called as a linear map of all pixels, which leaves the padding
    out. The operators are those that torch.compile uses for frozen networks on CPUs; they are not a public interface of
    PyTorch.

    Args:
        convolution: a frozen layer.
        activation: a ReLU, a ReLU6, or None.
        batch_size: images of a pass, for which weights are laid out.
    """

    def __init__(self, convolution: nn.Conv2d, activation: Optional[nn.Module], batch_size: int) -> None:
        super().__init__()
        self.convolution, self.batch_size = convolution, batch_size
        self.activation = {nn.ReLU: ("relu", []), nn.ReLU6: ("hardtanh", [0.0, 6.0]), type(None): ("none", [])}[
            type(activation)
        ]
        self.call: Optional[Callable[..., Tensor]] = None

    def forward(self, maps: Tensor, *added: Tensor) -> Tensor:
        if self.call is None:
            layer = self.convolution
            of_pixels = (layer.kernel_size, layer.stride, layer.padding, layer.groups) == ((1, 1), (1, 1), (0, 0), 1)
            activates = self.activation[0] != "none"
            pixels = maps.shape[2] * maps.shape[3]
            if pixels <= FEW_PIXELS and pixels < math.prod(layer.kernel_size) and layer.groups == 1:
                pack = _as_linear_of_maps
            elif of_pixels and not (added and activates):  # oneDNN's linear map either adds or activates
                pack = _as_linear
            else:
                pack = _as_convolution
            self.call = pack(layer, *self.activation, torch.Size((self.batch_size, *maps.shape[1:])), bool(added))
        return self.call(maps, *added)

    __call__ = forward  # without what PyTorch does around a module's forward, one part in ten of a small layer's time


def _as_convolution(
    layer: nn.Conv2d, activation: str, bounds: list[float], shape: torch.Size, adds: bool
) -> Callable[..., Tensor]:
    bias, form = layer.bias, (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)
    packed = torch._C._nn.mkldnn_reorder_conv2d_weight(layer.weight.detach().to_mkldnn(), *form, list(shape))
    if not adds:
        unary = torch.ops.mkldnn._convolution_pointwise.default
        return lambda maps: unary(maps, packed, bias, *form, activation, bounds, "")
    binary, last = torch.ops.mkldnn._convolution_pointwise.binary, None if activation == "none" else activation
    return lambda maps, added: binary(maps, added, packed, bias, *form, "add", 1.0, last, bounds, "")


def _as_linear(
    layer: nn.Conv2d, activation: str, bounds: list[float], shape: torch.Size, adds: bool
) -> Callable[..., Tensor]:
    bias, weight = layer.bias, layer.weight.detach().flatten(1).contiguous()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, shape[0] * shape[2] * shape[3])
    last, first = (0, 2, 3, 1), (0, 3, 1, 2)  # where channels go; in memory they are last already, so nothing moves
    if not adds:
        unary = torch.ops.mkldnn._linear_pointwise.default
        return lambda maps: unary(maps.permute(last), packed, bias, activation, bounds, "").permute(first)
    binary = torch.ops.mkldnn._linear_pointwise.binary
    return lambda maps, added: binary(maps.permute(last), added.permute(last), packed, bias, "add").permute(first)


def _as_linear_of_maps(
    layer: nn.Conv2d, activation: str, bounds: list[float], shape: torch.Size, adds: bool
) -> Callable[..., Tensor]:
    """The convolution as a linear map from all pixels of its input to all of its output."""
    inputs = shape[1:].numel()
    with torch.no_grad():
        units = torch.eye(inputs).view(inputs, *shape[2:], shape[1]).permute(0, 3, 1, 2)
        outputs = functional.conv2d(units, layer.weight, None, layer.stride, layer.padding, layer.dilation)
        weight = outputs.permute(0, 2, 3, 1).flatten(1).T.contiguous()
    bias = None if layer.bias is None else layer.bias.detach().repeat(outputs.shape[2:].numel())
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, shape[0])
    activate = {"none": lambda maps: maps, "relu": Tensor.relu_, "hardtanh": lambda maps: maps.clamp_(*bounds)}

    def flat(maps: Tensor) -> Tensor:
        return maps.permute(0, 2, 3, 1).reshape(len(maps), -1)

    def unflat(vectors: Tensor) -> Tensor:
        return vectors.view(len(vectors), *outputs.shape[2:], layer.out_channels).permute(0, 3, 1, 2)

    if not adds:
        unary = torch.ops.mkldnn._linear_pointwise.default
        return lambda maps: unflat(unary(flat(maps), packed, bias, activation, bounds, ""))
    binary, last = torch.ops.mkldnn._linear_pointwise.binary, activate[activation]
    return lambda maps, added: unflat(last(binary(flat(maps), flat(added), packed, bias, "add")))


def _pack_convolutions(block: GraphModule, batch_size: int) -> None:
    """Replace the convolutions in place, with the addition and the ReLU that follow."""
    graph, modules = block.graph, dict(block.named_modules())
    for node in list(graph.nodes):
        layer = modules.get(node.target) if node.op == "call_module" else None
        if not isinstance(layer, nn.Conv2d):
            continue
        replaced, inputs, activation = [node], [node.args[0]], None
        following = _only_user(node)
        if following is not None and following.target in (operator.add, operator.iadd, torch.add):
            others = [other for other in following.args if isinstance(other, Node) and other is not node]
            if len(others) == 1 and not following.kwargs:  # neither a number nor the convolution's own output
                inputs += others
                replaced.append(following)
                following = _only_user(following)
        if following is not None and type(modules.get(following.target)) in (nn.ReLU, nn.ReLU6):
            activation = modules[following.target]
            replaced.append(following)
        name = f"packed_{node.name}"
        block.add_module(name, _PackedConvolution(layer, activation, batch_size))
        with graph.inserting_before(replaced[-1]):
            replaced[-1].replace_all_uses_with(graph.call_module(name, tuple(inputs)))
        for old in reversed(replaced):
            graph.erase_node(old)
    block.delete_all_unused_submodules()
    block.recompile()


def _only_user(node: Node) -> Optional[Node]:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _untraceable(block: nn.Module) -> bool:
    """Blocks whose forward depends on the image's size, which torch.fx cannot follow; they hold no batch norm."""
    return not any(isinstance(module, nn.BatchNorm2d) for module in block.modules())


def _onnxruntime(network: nn.Module, example: Tensor) -> Runner:
    import onnxruntime

    resize, body = _without_input(network)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pixels = resize(example[:1].repeat(2, 1, 1, 1).cpu())
        batch = torch.export.Dim("batch", min=1, max=4096)
        program = torch.onnx.export(body.cpu(), (pixels,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            outputs = session.run(None, {name: resize(images.cpu()).contiguous().numpy()})
        return torch.from_numpy(outputs[0]).to(images.device)

    return run


def _without_input(network: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The resizing of uint8 pixels stays in PyTorch; the rest is exported."""
    children = dict(copy.deepcopy(network).named_children())
    return children.pop("input"), nn.Sequential(*children.values()).eval()
