"""The windows that a convolution or pooling moves over its input: sizes, padding, what is left at the end."""

from __future__ import annotations

from dataclasses import dataclass

from cloud_hub.builder.gradients.site import Site, UnsupportedNodeError, static

Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Windows:
    """One entry a spatial axis.

    `begin` is the padding in front, `trail` that behind as far as a window reaches; negative where the
    windows leave a rest of the input untouched.
    """

    kernel: Sizes
    stride: Sizes
    dilation: Sizes
    begin: Sizes
    trail: Sizes
    size: Sizes
    """How long the input is."""
    count: Sizes
    """How many windows there are, the output's length."""

    @property
    def axes(self) -> int:
        """How many spatial axes there are."""
        return len(self.kernel)

    @property
    def end(self) -> Sizes:
        """The padding behind, without what no window reaches."""
        return tuple(max(0, trail) for trail in self.trail)

    @property
    def rest(self) -> Sizes:
        """How much of the input's end no window reaches: ConvTranspose's `output_padding`."""
        return tuple(max(0, -trail) for trail in self.trail)

    @property
    def pads(self) -> list[int]:
        """`pads` in the order of the operators."""
        return [*self.begin, *self.end]

    @property
    def overlap(self) -> bool:
        """Whether an element may lie in two windows."""
        spans = zip(self.kernel, self.stride, self.dilation, strict=True)
        return any(dilation * (kernel - 1) >= stride for kernel, stride, dilation in spans)


def windows_of(site: Site, kernel: Sizes) -> Windows:
    """Read a node's windows from its attributes and the shapes around it.

    Raises:
        UnsupportedNodeError: if the spatial shape is not known.
    """
    size, count = static(site.x.dims[2:]), static(site.y.dims[2:])
    axes = len(kernel)
    stride = tuple(site.attribute("strides") or [1] * axes)
    dilation = tuple(site.attribute("dilations") or [1] * axes)
    if len(size) != axes:
        raise UnsupportedNodeError("kernel and input differ in their axes")
    reach = [
        (many - 1) * step + apart * (width - 1) + 1
        for many, step, apart, width in zip(count, stride, dilation, kernel, strict=True)
    ]
    begin = _begin(site, [needed - given for needed, given in zip(reach, size, strict=True)])
    trail = tuple(n - b - s for n, b, s in zip(reach, begin, size, strict=True))
    return Windows(kernel, stride, dilation, begin, trail, size, count)


def _begin(site: Site, missing: list[int]) -> Sizes:
    """Padding in front; `SAME_*` splits what is missing, as the specification says."""
    mode = site.attribute("auto_pad", b"NOTSET")
    if mode == b"SAME_UPPER":
        return tuple(max(0, count) // 2 for count in missing)
    if mode == b"SAME_LOWER":
        return tuple((max(0, count) + 1) // 2 for count in missing)
    pads = site.attribute("pads") if mode == b"NOTSET" else None
    return tuple(pads[: len(missing)]) if pads else (0,) * len(missing)
