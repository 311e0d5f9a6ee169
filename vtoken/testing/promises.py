"""What holds for every supported model and every method, one function a promise.

Each takes a model that carries no method, settings, and leaves the model as it was; it raises AssertionError, which
names the promise and what was found.
"""

from __future__ import annotations

import copy
import gc
import io
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from vtoken.accounting.ideal import Ideal
from vtoken.accounting.report import report
from vtoken.core.apply import applied, apply, remove
from vtoken.core.config import MethodConfig
from vtoken.core.counts import chosen, plan, removing
from vtoken.core.host import find_adapter
from vtoken.core.trace import Trace, tracing
from vtoken.errors import VTokenError
from vtoken.testing.models import images_for

#: Relative error of float64 results that were computed in another order.
_ROUNDING = 1e-9


def broken(promise: str, found: str) -> NoReturn:
    """Raise the error for a promise that is not kept."""
    raise AssertionError(f"{promise}: {found}")


def outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Every tensor that the model's image part gives for images [B, C, H, W]."""
    return list(_tensors(find_adapter(model).run_image(model, images)))


def no_op(model: nn.Module, noop: MethodConfig) -> None:
    """Settings that take nothing away give the outputs of the model before, bit for bit."""
    promise = f"no-op equality with {noop}"
    planned = plan(model, noop)
    if planned.exact and planned.tokens[-1] != planned.tokens[0]:
        broken(promise, f"these settings were to remove nothing, and vtoken.plan says {planned.tokens}")
    for gradients in (False, True):
        x = images_for(model, 2)
        with torch.set_grad_enabled(gradients):
            before = outputs(model, x)
            with applied(model, noop):
                after = outputs(model, x)
        _same(promise, "the output", before, after)


def counts(model: nn.Module, config: MethodConfig) -> None:
    """As many tokens are left in every block as `vtoken.plan` says, whatever the batch."""
    promise = f"planned counts are kept with {config}"
    with applied(model, config):
        found = plan(model)
        for batch in (1, 3):
            _, trace = traced(model, images_for(model, batch))
            ends = zip(found.least, trace.tokens, found.tokens, strict=True)
            if not all(low <= n <= high for low, n, high in ends):
                said = found.tokens if found.exact else f"{found.least} to {found.tokens}"
                broken(promise, f"vtoken.plan says {said}, a batch of {batch} had {tuple(trace.tokens)}")


def groups(model: nn.Module, config: MethodConfig, *, pruned: bool) -> None:
    """The group map is a partition in which prefix tokens are alone, and sizes count its groups.

    Args:
        pruned: tokens are dropped, not merged: what is left has size 1.
    """
    with applied(model, config):
        _, trace = traced(model, images_for(model, 2))
    assert trace.dest is not None
    assert trace.size is not None
    prefix, left = trace.num_prefix, trace.tokens[-1]
    own, others = torch.arange(prefix).expand(trace.dest.shape[0], -1), trace.dest[:, prefix:]
    if not torch.equal(trace.dest[:, :prefix], own) or bool(((others >= 0) & (others < prefix)).any()):
        broken("prefix tokens keep their rows and take nothing in", f"the group map is {trace.dest.tolist()}")
    for layer, dest in enumerate(trace.layer_dest):
        for image in dest:
            rows = image[image >= 0].unique().tolist()
            if rows != list(range(trace.tokens[layer + 1])) or (not trace.dropped and bool((image < 0).any())):
                broken(
                    "the group map is a partition",
                    f"behind block {layer} {trace.tokens[layer + 1]} rows are left, and the map names rows {rows}",
                )
    if trace.size.dtype != torch.float32:
        broken("sizes are float32", f"they are {trace.size.dtype}")
    for dest, size in zip(trace.dest, trace.size, strict=True):
        expected = torch.ones(left) if pruned or trace.dropped else torch.bincount(dest, minlength=left).float()
        if not torch.equal(size, expected):
            broken(
                "sizes sum to the tokens",
                f"they are {size.tolist()} (sum {size.sum():g}), the groups have {expected.tolist()} (sum "
                f"{expected.sum():g}) of the {trace.tokens[0]} tokens",
            )


def undone(model: nn.Module, config: MethodConfig) -> None:
    """`vtoken.remove` gives back the very model: classes, attributes and outputs."""
    x, before = images_for(model, 2), _parts(model)
    with torch.no_grad():
        stock = outputs(model, x)
        apply(model, config)
        outputs(model, x)
        remove(model)
        again = outputs(model, x)
    if _parts(model) != before:
        broken("vtoken.remove undoes everything", "a class or an attribute of a module is not what it was")
    _same("vtoken.remove undoes everything", "the output", stock, again)


def sizes(model: nn.Module, config: MethodConfig) -> None:
    """A token that stands for several patches counts as that many keys, where `prop_attn` says so."""
    if plan(model, config).removed.count(0) == len(plan(model, config).removed):
        return
    x, found = images_for(model, 2), []
    for prop_attn in (True, False):
        with applied(model, config.replace(prop_attn=prop_attn)), torch.no_grad():
            found.append(outputs(model, x))
    if all(torch.equal(a, b) for a, b in zip(*found, strict=True)):
        broken("sizes enter attention", f"prop_attn changes nothing in any output with {config}")


def hooks(model: nn.Module, config: MethodConfig) -> None:
    """Every module that runs in the model runs with the method, and its hooks are given that very module."""
    promise, x = f"hooks are those of the model's own modules with {config}", images_for(model, 1)
    names = {id(module): name for name, module in model.named_modules()}
    seen: list[int] = []
    handles = [m.register_forward_hook(lambda module, *_: seen.append(id(module))) for m in model.modules()]
    try:
        with torch.no_grad():
            outputs(model, x)
            stock = set(seen)
            seen.clear()
            with applied(model, config):
                outputs(model, x)
    finally:
        for handle in handles:
            handle.remove()
    strangers = [i for i in seen if i not in names]
    if strangers:
        broken(promise, "a hook was given a module that is not in the model: a part was called on a copy")
    missing = sorted(names[i] or "the model" for i in stock - set(seen))
    if missing:
        broken(promise, f"{', '.join(missing)} ran before and does not run now: call submodules, not their weights")


def parameters(model: nn.Module, config: MethodConfig) -> None:
    """State-dict keys, parameters, train or eval mode are the model's own while the method is applied."""
    keys, own = list(model.state_dict()), [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    modes = [m.training for m in model.modules()]
    with applied(model, config):
        if list(model.state_dict()) != keys:
            broken("state-dict keys are kept", f"{set(model.state_dict()) ^ set(keys)} came or went")
        if [(n, id(p), p.requires_grad) for n, p in model.named_parameters()] != own:
            broken("parameters are kept", "one was replaced, or changed requires_grad")
        outputs(model, images_for(model, 2))
        if [m.training for m in model.modules()] != modes:
            broken("train and eval mode are kept", "a module changed its mode")


def gradients(model: nn.Module, config: MethodConfig) -> None:
    """Gradients reach every part; two forwards before one backward, and recomputed blocks, give the same ones."""
    promise = f"gradients with {config}"
    network = copy.deepcopy(model).double().requires_grad_(True)
    first, second = (images_for(model, batch, seed, torch.float64) for batch, seed in ((2, 1), (1, 2)))
    stock = _gradients(network, [first])
    with applied(network, config):
        parts = [_gradients(network, [x]) for x in (first, second)]
        both = _gradients(network, [first, second])
        recomputed = both
        checkpointing: Any = getattr(network, "set_grad_checkpointing", None)
        if checkpointing is not None:
            checkpointing(True)
            recomputed = _gradients(network, [first, second])
    missing = sorted(stock.keys() - both.keys())
    if missing:
        broken(promise, f"none reach {', '.join(missing[:3])}, which the model without the method trains")
    for name, grad in both.items():
        apart = torch.stack([found.get(name, torch.zeros_like(grad)) for found in parts]).sum(0)
        for what, other in (("two forwards before one backward", grad), ("recomputed blocks", recomputed[name])):
            if not close(other, apart):
                broken(f"{promise}: {what}", f"that of {name} is another than by single forwards")


def forwards(model: nn.Module, config: MethodConfig) -> None:
    """A forward does not depend on those before it, draws no random number and leaves its images alone."""
    promise = f"a forward leaves nothing behind with {config}"
    one, other = images_for(model, 2), images_for(model, 3, seed=1)
    kept, state = one.clone(), torch.get_rng_state()
    with applied(model, config), torch.no_grad():
        first = outputs(model, one)
        outputs(model, other)
        _same(promise, "after a forward of other images the output", first, outputs(model, one))
    if not torch.equal(torch.get_rng_state(), state):
        broken(promise, "torch's random state is another")
    if not torch.equal(one, kept):
        broken(promise, "the images were written to")


def memory(model: nn.Module, config: MethodConfig) -> None:
    """No tensor of a forward outlives it. Looks through all objects of the process, which takes a while."""
    x = images_for(model, 2)
    with applied(model, config), torch.no_grad():
        outputs(model, x)
        before = _alive()  # held until the end, so that no new tensor takes the place of one that is gone
        known = {id(tensor) for tensor in before}
        outputs(model, x)
        outputs(model, x)
        more = sum(id(tensor) not in known for tensor in _alive())
    if more > 0:
        broken(f"no hidden memory with {config}", f"{more} tensor(s) of two forwards are alive behind them")


def batches(model: nn.Module, config: MethodConfig) -> None:
    """The result for one image does not depend on its neighbours in the batch; not where they decide the counts."""
    promise = f"rows of images are independent with {config}"
    network, x = copy.deepcopy(model).double(), images_for(model, 3, dtype=torch.float64)
    with applied(network, config):
        if not plan(network).exact:
            return
        together, trace = traced(network, x)
        for index in range(3):
            alone, single = traced(network, x[index : index + 1])
            if not _equal(single.dest, None if trace.dest is None else trace.dest[index : index + 1]):
                broken(promise, f"image {index} of a batch of 3 merges otherwise than alone")
            for a, b in zip(alone, together, strict=True):
                if not close(a[0], b[index]):
                    broken(promise, f"image {index} of a batch of 3 gives another output than alone")


def threads(model: nn.Module, config: MethodConfig) -> None:
    """Threads that share a model do not disturb one another."""
    promise = f"threads do not disturb one another with {config}"
    network = copy.deepcopy(model).double()
    batches = [images_for(model, n, seed=n, dtype=torch.float64) for n in (1, 2, 3)]
    found: dict[int, list[list[Tensor]]] = {index: [] for index in range(3)}
    errors: list[BaseException] = []
    with applied(network, config), torch.no_grad():
        expected = [outputs(network, x) for x in batches]
        start = threading.Barrier(3)

        def work(index: int) -> None:
            try:
                with torch.no_grad():
                    start.wait()
                    found[index] += [outputs(network, batches[index]) for _ in range(4)]
            except BaseException as error:
                errors.append(error)

        workers = [threading.Thread(target=work, args=(index,)) for index in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    if errors:
        raise AssertionError(f"{promise}: one of three failed: {errors[0]!r}") from errors[0]
    for index, runs in found.items():
        for run in runs:
            if not all(close(a, b) for a, b in zip(run, expected[index], strict=True)):
                broken(promise, "one of three gave another output than the model by itself")


def copies(model: nn.Module, config: MethodConfig) -> None:
    """A patched model can be copied and pickled, and the copy computes the same."""
    x = images_for(model, 2)
    with applied(model, config), torch.no_grad():
        expected = outputs(model, x)
        copied = outputs(copy.deepcopy(model), x)
        _same("a deep copy of a patched model computes the same", "the output", expected, copied)
        file = io.BytesIO()
        try:
            torch.save(model, file)
            file.seek(0)
            loaded = torch.load(file, weights_only=False)
        except Exception as error:
            raise AssertionError(
                f"a patched model can be pickled: {type(error).__name__}: {error}. Settings and method classes must "
                "stand at the top of a module, and hold nothing that cannot be pickled"
            ) from error
        _same("a pickled model computes the same", "the output", expected, outputs(loaded, x))


def kinds(model: nn.Module, config: MethodConfig) -> None:
    """Outputs have the dtype and the device of the unpatched model's, in every float type and on every device here."""
    places = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for place in places:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            network = copy.deepcopy(model).to(place, dtype)
            x = images_for(model, 2, dtype=dtype).to(place)
            with torch.no_grad():
                before = [(out.dtype, out.device) for out in outputs(network, x)]
                with applied(network, config):
                    after = outputs(network, x)
            if [(out.dtype, out.device) for out in after] != before:
                broken("dtype and device are kept", f"of {before} became {[(o.dtype, o.device) for o in after]}")
            if not all(bool(out.isfinite().all()) for out in after):
                broken("outputs are finite", f"not in {dtype} on {place}")


def costs(model: nn.Module, config: MethodConfig) -> None:
    """`vtoken.report` can count, and what it says of the choosing is what torch's products cost.

    Where the images decide the counts nothing can be counted, and the method's own word stands.
    """
    promise = f"vtoken.report tells the cost with {config}"
    adapter = find_adapter(model)
    size = (adapter.channels(model), *adapter.image_size(model))
    try:
        told = report(model, config, input_size=size)
    except VTokenError:
        raise
    except Exception as error:
        raise AssertionError(
            f"{promise}: on the meta device, where there are shapes and no data, {type(error).__name__}: {error}"
        ) from error
    if not told.exact:
        return
    method = removing(chosen(model, config, {})[2])
    narrow = Ideal(removed=plan(model, config, img_size=size[1:]).removed, place=method.insert)
    spent = told.macs_after - report(model, narrow, input_size=size).macs_after
    if abs(spent - told.matching_macs) > 0.02 * max(spent, told.matching_macs):
        broken(
            promise,
            f"choosing takes {spent} multiply-adds by torch's counter, and `macs` (or `matching_macs`) says "
            f"{told.matching_macs}",
        )


def traced(model: nn.Module, images: Tensor) -> tuple[list[Tensor], Trace]:
    """Outputs and the record of one forward, without gradients."""
    with torch.no_grad(), tracing(model) as trace:
        found = outputs(model, images)
    return found, trace


def _tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, dict):
        for value in out.values():
            yield from _tensors(value)
    elif isinstance(out, (tuple, list)):
        for value in out:
            yield from _tensors(value)


def _same(promise: str, what: str, expected: list[Tensor], found: list[Tensor]) -> None:
    for a, b in zip(expected, found, strict=True):
        if a.shape != b.shape:
            broken(promise, f"{what} has the shape {tuple(b.shape)}, not {tuple(a.shape)}")
        if not torch.equal(a, b):
            apart = float((a.detach() - b.detach()).abs().max())
            broken(promise, f"{what} is not bit-equal; it differs by up to {apart:.3g}")


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def close(a: Tensor, b: Tensor) -> bool:
    """Whether float64 results are equal but for the order in which they were computed."""
    if a.shape != b.shape:
        return False
    scale = float(b.detach().abs().max()) if b.numel() else 0.0
    return bool(((a - b).abs() <= _ROUNDING * max(scale, 1e-6)).all())


def _gradients(network: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Of a loss in which every output of every forward counts, by parameter."""
    network.zero_grad()
    results = [out for x in inputs for out in outputs(network, x)]
    loss = torch.stack([(out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() for out in results]).sum()
    loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def _parts(model: nn.Module) -> list[tuple[str, int, dict[str, int]]]:
    return [(name, id(type(m)), {k: id(v) for k, v in m.__dict__.items()}) for name, m in model.named_modules()]


def _alive() -> list[Tensor]:
    """Tensors that Python knows of."""
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]


#: Tried with one setting, on every model: what no method and no host may break.
EVERY = (parameters, costs, forwards, batches, gradients, threads, copies, kinds)
