r"""One step of continual trajectory shifting for all T tasks, in one launch (Shin et al., ICML 2021, Algorithm 2).

    d = ±g_t + λ θ_t;   v_t ← μ v_t + (1 − dampening) d;   u = v_t  (Nesterov: d + μ v_t;  μ = 0: d)
    θ_t ← θ_t − α u                                      inner step of every task t with a gradient
    Δ = (β / T) Σ_t (θ_t − φ);   φ ← φ + Δ               meta-update
    θ_t ← θ_t + shift · Δ                                shift;   at K:  θ_t ← φ  (and v_t ← 0)

A program owns BLOCK columns of one tensor and holds θ′ of up to ROWS tasks in registers, so every number is read once
and written once. Above ROWS tasks, θ′ is stored, summed up on the way, and read back (from cache) for the shift. Heads
take the inner step alone.

Three tuples travel through the functions:
    buffers: theta, v, master and the stride from one task's row to the next.
    inputs: of one tensor: its gradients' addresses (until `_columns_step`: all tensors' and the index of its first),
        the flags `started` and `nonfinite` (one entry a task each; a flag that is not asked for is None), its group's
        hyper-parameters, and the gradients' factor.
    columns: of a program: where they start in the buffers and in the gradient, 0 to BLOCK − 1, and which of them lie in
        the tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl

# entries of a tile: its column in the buffers, columns left in its tensor, its start there, group, first gradient
TILE = tl.constexpr(5)
# entries of a group: Hyper's eight, the gradients' factor, a tensor α's address and whether it is float64, β's, T of
# the mean
HYPER = tl.constexpr(14)
LR, MOMENTUM, DAMPENING, WEIGHT_DECAY, NESTEROV, MAXIMIZE = (tl.constexpr(i) for i in range(6))
META_LR, SHIFT, FACTOR, LR_TENSOR, META_LR_TENSOR, NUM_TASKS = (tl.constexpr(i) for i in (6, 7, 8, 9, 11, 13))
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
META_UPDATE, RESET, RESET_MOMENTUM = (tl.constexpr(1 << i) for i in range(3))  # bits of `mode`


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """x in the parameters' dtype, ties to even; the interpreter would truncate to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    return x.to(dtype)


@triton.jit
def _learning_rate(value, tensor):
    """A rate as the user gave it: a number, or a tensor of one, by its address and whether it is float64."""
    rate = tl.load(value)
    entries = tensor.to(tl.pointer_type(tl.int64), bitcast=True)
    address = tl.load(entries)
    if address != 0:
        if tl.load(entries + 1) != 0:
            rate = tl.load(address.to(tl.pointer_type(tl.float64)))
        else:
            rate = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return rate


@triton.jit
def _stored(theta, master, offsets, mask, WORK: tl.constexpr):
    """θ in working precision: float32 or float64 as stored; lower precision from its master, unless the user wrote the
    parameter since.
    """
    x = tl.load(theta + offsets, mask=mask, other=0)
    if master is None:
        return x
    else:
        exact = tl.load(master + offsets, mask=mask, other=0)
        return tl.where(_rounded(exact, theta.dtype.element_ty) == x, exact, x.to(WORK))


@triton.jit
def _store(theta, master, offsets, mask, x):
    """Write θ, and its master where it has one."""
    tl.store(theta + offsets, _rounded(x, theta.dtype.element_ty), mask=mask)
    if master is not None:
        tl.store(master + offsets, x, mask=mask)


@triton.jit
def _inner_update(
    buffers, inputs, columns, rows, row_mask, clear, ALIGNED: tl.constexpr, WORK: tl.constexpr, PLAIN: tl.constexpr
):
    """θ′ [ROWS, BLOCK] of the tasks `rows`; writes their momentum. clear: momentum ends at zero."""
    theta, v, master, stride = buffers
    gradients, flags, h, factor = inputs
    started, nonfinite = flags
    column, start, numbers, inside = columns
    offsets = rows.to(tl.int64)[:, None] * stride + (column + numbers)[None, :]
    mask = row_mask[:, None] & inside[None, :]
    address = tl.load(gradients + rows, mask=row_mask, other=0)
    has = (address != 0)[:, None]
    gradient = address.to(tl.pointer_type(theta.dtype.element_ty))[:, None] + (start + numbers)[None, :]
    if ALIGNED:
        gradient = tl.multiple_of(gradient, [1, 16])
    g = tl.load(gradient, mask=mask & has, other=0).to(WORK)
    x = _stored(theta, master, offsets, mask, WORK)
    mu, lr = tl.load(h + MOMENTUM).to(WORK), _learning_rate(h + LR, h + LR_TENSOR)
    weight_decay = tl.load(h + WEIGHT_DECAY).to(WORK)
    # conditions have a shape, since the interpreter cannot broadcast a scalar one
    decays = tl.full([1], weight_decay, WORK) != 0
    if PLAIN:
        has_momentum = tl.full([1], 1, tl.int1)
        old = tl.load(v + offsets, mask=mask, other=0).to(WORK)
        new = tl.where(decays, tl.fma(weight_decay, x, g), g) + mu * old
        u = new
    else:
        has_momentum = tl.full([1], mu, WORK) != 0
        old = tl.load(v + offsets, mask=mask & has_momentum, other=0).to(WORK)
        gain = (1 - tl.load(h + DAMPENING)).to(WORK)
        nesterov = tl.full([1], tl.load(h + NESTEROV), tl.float64) != 0
        maximize = tl.full([1], tl.load(h + MAXIMIZE), tl.float64) != 0
        g = g * factor.to(WORK)
        if nonfinite is not None:
            bad = tl.max((tl.abs(g) < float("inf")).to(tl.int32) ^ 1, axis=1)
            tl.store(nonfinite + rows, bad.to(tl.uint8), mask=row_mask & (bad != 0))
        d = tl.where(maximize, -g, g)
        d = tl.where(decays, tl.fma(weight_decay, x, d), d)
        new = tl.fma(gain, d, mu * old)
        if started is not None:
            new = tl.where((tl.load(started + rows, mask=row_mask, other=1) != 0)[:, None], new, d)
        u = tl.where(has_momentum, tl.where(nesterov, tl.fma(mu, new, d), new), d)
    new = tl.where(clear, 0.0, tl.where(has, new, old))
    tl.store(v + offsets, _rounded(new, v.dtype.element_ty), mask=mask & (clear | (has & has_momentum)))
    return tl.where(has, tl.fma((-lr).to(WORK), u, x), x), offsets, mask


@triton.jit
def _inner_updates_in_turn(
    buffers,
    inputs,
    columns,
    p,
    clear,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    WORK: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Σ_t (θ′_t − φ) [BLOCK]; θ′ of ROWS tasks after the other is stored."""
    theta, v, master, stride = buffers
    rows = tl.arange(0, ROWS)
    total = tl.full([BLOCK], 0, WORK)
    for t in range(0, T, ROWS):  # not unrolled: 128 tasks would compile for a minute
        here = t + rows < T
        x, offsets, mask = _inner_update(buffers, inputs, columns, t + rows, here, clear, ALIGNED, WORK, PLAIN)
        total += tl.sum(tl.where(here[:, None], x - p[None, :], 0.0), axis=0)
        _store(theta, master, offsets, mask, x)
    return total


@triton.jit
def _shift_in_turn(
    buffers, column, numbers, inside, p, moved, shift, reset, T: tl.constexpr, ROWS: tl.constexpr, WORK: tl.constexpr
):
    """θ ← θ′ + shift · Δ, or φ at a reset, of ROWS stored tasks in turn. moved: Δ, and whether anything moves."""
    theta, v, master, stride = buffers
    delta, moves = moved
    rows = tl.arange(0, ROWS)
    for t in range(0, T, ROWS):
        offsets = (t + rows).to(tl.int64)[:, None] * stride + (column + numbers)[None, :]
        mask = (t + rows < T)[:, None] & inside[None, :]
        x = _stored(theta, master, offsets, mask, WORK)
        x = tl.where(moves, tl.fma(shift, delta[None, :], x), x)
        _store(theta, master, offsets, mask, tl.where(reset, p[None, :], x))


@triton.jit
def _columns_step(
    buffers,
    phi,
    inputs,
    column,
    start,
    count,
    mode,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    WORK: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """One step of `count` columns, at most BLOCK, of all T tasks; without phi: of a head."""
    theta, v, master, stride = buffers
    gradients, first, flags, h, factor = inputs
    inputs = (gradients + first, flags, h, factor)  # those of this tensor
    numbers = tl.arange(0, BLOCK)
    inside = numbers < count
    columns = (column, start, numbers, inside)
    rows = tl.arange(0, ROWS)
    if phi is None:
        x, offsets, mask = _inner_update(buffers, inputs, columns, rows, rows < T, rows < 0, ALIGNED, WORK, PLAIN)
        _store(theta, master, offsets, mask, x)
    else:
        bits = tl.full([1], mode, tl.int32)
        meta_update, reset = (bits & META_UPDATE) != 0, (bits & RESET) != 0
        clear = reset & ((bits & RESET_MOMENTUM) != 0)
        p = tl.load(phi + column + numbers, mask=inside, other=0)
        meta_lr, shift = _learning_rate(h + META_LR, h + META_LR_TENSOR), tl.load(h + SHIFT).to(WORK)
        num_tasks = tl.load(h + NUM_TASKS)
        if T <= ROWS:
            x, offsets, mask = _inner_update(buffers, inputs, columns, rows, rows < T, clear, ALIGNED, WORK, PLAIN)
            total = tl.sum(tl.where((rows < T)[:, None], x - p[None, :], 0.0), axis=0)
        else:
            total = _inner_updates_in_turn(buffers, inputs, columns, p, clear, T, ROWS, BLOCK, ALIGNED, WORK, PLAIN)
            tl.debug_barrier()  # what is read back below may have been stored by another thread
        moves = meta_update & (tl.full([1], meta_lr, tl.float64) != 0)
        delta = tl.where(moves, total * (meta_lr / num_tasks).to(WORK), 0.0)
        p = tl.where(moves, p + delta, p)
        tl.store(phi + column + numbers, p, mask=inside & moves)
        if T <= ROWS:
            x = tl.where(moves, tl.fma(shift, delta[None, :], x), x)
            _store(theta, master, offsets, mask, tl.where(reset, p[None, :], x))
        else:
            _shift_in_turn(buffers, column, numbers, inside, p, (delta, moves), shift, reset, T, ROWS, WORK)


@triton.jit
def _tile_step(
    buffers,
    phi,
    inputs,
    tile,
    mode,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    WORK: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """One step of a tile, with code of its own for whole ones. tile: its column, start in the tensor, columns left."""
    column, start, left = tile
    if left >= BLOCK:
        _columns_step(buffers, phi, inputs, column, start, BLOCK, mode, T, ROWS, BLOCK, ALIGNED, WORK, PLAIN)
    else:
        _columns_step(buffers, phi, inputs, column, start, left, mode, T, ROWS, BLOCK, ALIGNED, WORK, PLAIN)


@triton.jit
def _counted_mode(counters, mode, horizon, meta_interval):
    """`mode` of a step that the device counts."""
    inner_step = tl.load(counters) + 1
    updates = inner_step % meta_interval == 0
    return (mode & RESET_MOMENTUM) | tl.where(updates, META_UPDATE, 0) | tl.where(inner_step >= horizon, RESET, 0)


@triton.jit
def _advance(counters, started, gradients, groups, hyper, count, shared_count, mode, counts, BLOCK: tl.constexpr):
    """What the last program to finish does: counters and first-gradient flags, and the ticket for the next step."""
    meta_update, reset = (mode & META_UPDATE) != 0, (mode & RESET) != 0
    clear = reset & ((mode & RESET_MOMENTUM) != 0)
    start = 0
    while start < count:  # no range: Triton 3.6 interprets none that ends at an argument with NumPy 2.5
        i = start + tl.arange(0, BLOCK)
        mask = i < count
        mu = tl.load(hyper + HYPER * tl.load(groups + i, mask=mask, other=0) + MOMENTUM, mask=mask, other=0)
        first = (tl.load(gradients + i, mask=mask, other=0) != 0) & (mu != 0)
        flag = tl.load(started + i, mask=mask, other=0)
        flag = tl.where(first, 1, flag).to(tl.uint8)
        tl.store(started + i, tl.where(clear & (i < shared_count), 0, flag).to(tl.uint8), mask=mask)
        start += BLOCK
    if counts:
        inner_step = tl.load(counters)
        tl.store(counters, tl.where(reset, 0, inner_step + 1))
        tl.store(counters + 1, tl.load(counters + 1) + reset.to(tl.int64))
        tl.store(counters + 2, tl.load(counters + 2) + meta_update.to(tl.int64))


@triton.jit(do_not_specialize=["mode", "horizon", "meta_interval", "shared_tiles", "shared_count", "count", "counts"])
def shifting_step_kernel(
    tiles,  # int64 [tiles, TILE], those of shared tensors first
    gradients,  # int64 [count]: addresses, 0 for none; those of shared tensors first
    groups,  # int32 [count]
    hyper,  # float64 [groups, HYPER]
    started,  # uint8 [count], as nonfinite; or None
    nonfinite,
    theta,  # [T, stride], as v; master: the same in float32, or None
    v,
    master,
    phi,  # [stride]
    stride,
    head_theta,  # [1, columns], as head_v and head_master; or None
    head_v,
    head_master,
    shared_tiles,
    shared_count,
    count,
    mode,
    counters,  # int64 [4]; it and what follows it only where the device counts, else None
    ticket,
    horizon,
    meta_interval,
    found_inf,
    grad_scale,
    counts,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,  # every gradient starts at a multiple of 16 bytes
    WORK: tl.constexpr,
    DAMPENED: tl.constexpr,  # the flags `started` are read
    PLAIN: tl.constexpr,  # momentum everywhere; no Nesterov, maximize, dampening, factor of the gradients, or flags
):
    """See the module. Grid: one program a tile."""
    number = tl.program_id(0)
    mine = tiles + number.to(tl.int64) * TILE
    column, left, start = tl.multiple_of(tl.load(mine), 16), tl.load(mine + 1), tl.load(mine + 2)
    h, first = hyper + tl.load(mine + 3) * HYPER, tl.load(mine + 4)
    factor = tl.load(h + FACTOR)
    works = True
    if counters is not None:
        mode = _counted_mode(counters, mode, horizon, meta_interval)
        if grad_scale is not None:
            factor = 1 / tl.load(grad_scale).to(tl.float64)
        if found_inf is not None:
            works = tl.load(found_inf) == 0
            left = tl.where(works, left, 0)
    # None is written inside the tuple: a variable of that value could not become a part of one
    flags = (started + first if DAMPENED else None, None if nonfinite is None else nonfinite + first)
    inputs, tile = (gradients, first, flags, h, factor), (column, tl.multiple_of(start, BLOCK), left)
    if number < shared_tiles:
        _tile_step((theta, v, master, stride), phi, inputs, tile, mode, T, ROWS, BLOCK, ALIGNED, WORK, PLAIN)
    elif head_theta is not None:
        _tile_step((head_theta, head_v, head_master, 0), None, inputs, tile, mode, 1, 1, BLOCK, ALIGNED, WORK, PLAIN)
    if counters is not None:
        tl.debug_barrier()  # every thread has read the counters before this program hands in its ticket
        if tl.atomic_add(ticket, 1) == tl.num_programs(0) - 1:
            tl.store(ticket, 0)
            if works:
                _advance(counters, started, gradients, groups, hyper, count, shared_count, mode, counts, BLOCK)


@triton.jit
def _columns_partial(
    buffers,
    phi,
    inputs,
    column,
    start,
    count,
    total,
    mode,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    WORK: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """The first half of a step in two, of `count` columns, at most BLOCK."""
    gradients, first, flags, h, factor = inputs
    numbers = tl.arange(0, BLOCK)
    inside = numbers < count
    p = tl.load(phi + column + numbers, mask=inside, other=0)
    bits = tl.full([1], mode, tl.int32)
    clear = ((bits & RESET) != 0) & ((bits & RESET_MOMENTUM) != 0)
    own, columns = (gradients + first, flags, h, factor), (column, start, numbers, inside)
    x = _inner_updates_in_turn(buffers, own, columns, p, clear, T, ROWS, BLOCK, ALIGNED, WORK, PLAIN)
    tl.store(total + column + numbers, x, mask=inside)


@triton.jit(do_not_specialize=["mode", "shared_tiles"])
def partial_step_kernel(
    tiles,  # these and the following as in `shifting_step_kernel`
    gradients,
    hyper,
    started,
    nonfinite,
    theta,
    v,
    master,
    phi,
    stride,
    head_theta,
    head_v,
    head_master,
    total,  # [stride], as phi
    shared_tiles,
    mode,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    WORK: tl.constexpr,
    DAMPENED: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """The first half of a step in two: θ_t ← θ′_t and total ← Σ_t (θ′_t − φ). Grid: one program a tile."""
    number = tl.program_id(0)
    mine = tiles + number.to(tl.int64) * TILE
    column, left, start = tl.multiple_of(tl.load(mine), 16), tl.load(mine + 1), tl.load(mine + 2)
    h, first = hyper + tl.load(mine + 3) * HYPER, tl.load(mine + 4)
    start = tl.multiple_of(start, BLOCK)
    flags = (started + first if DAMPENED else None, None if nonfinite is None else nonfinite + first)
    inputs, buffers = (gradients, first, flags, h, tl.load(h + FACTOR)), (theta, v, master, stride)
    if number < shared_tiles:
        if left >= BLOCK:  # with code of its own, as in `_tile_step`
            _columns_partial(
                buffers, phi, inputs, column, start, BLOCK, total, mode, T, ROWS, BLOCK, ALIGNED, WORK, PLAIN
            )
        else:
            _columns_partial(
                buffers, phi, inputs, column, start, left, total, mode, T, ROWS, BLOCK, ALIGNED, WORK, PLAIN
            )
    elif head_theta is not None:
        tile = (column, start, left)
        _tile_step((head_theta, head_v, head_master, 0), None, inputs, tile, mode, 1, 1, BLOCK, ALIGNED, WORK, PLAIN)


@triton.jit
def _columns_finish(
    buffers,
    phi,
    total,
    h,
    column,
    count,
    mode,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WORK: tl.constexpr,
):
    """The second half of `count` columns, at most BLOCK."""
    bits = tl.full([1], mode, tl.int32)
    meta_update, reset = (bits & META_UPDATE) != 0, (bits & RESET) != 0
    numbers = tl.arange(0, BLOCK)
    inside = numbers < count
    p = tl.load(phi + column + numbers, mask=inside, other=0)
    x = tl.load(total + column + numbers, mask=inside, other=0)
    meta_lr, shift = tl.load(h + META_LR), tl.load(h + SHIFT).to(WORK)
    moves = meta_update & (tl.full([1], meta_lr, tl.float64) != 0)
    delta = tl.where(moves, x * (meta_lr / tl.load(h + NUM_TASKS)).to(WORK), 0.0)
    p = tl.where(moves, p + delta, p)
    tl.store(phi + column + numbers, p, mask=inside & moves)
    _shift_in_turn(buffers, column, numbers, inside, p, (delta, moves), shift, reset, T, ROWS, WORK)


@triton.jit(do_not_specialize=["mode"])
def finish_step_kernel(
    tiles,
    hyper,
    theta,
    master,
    phi,
    stride,
    total,
    mode,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WORK: tl.constexpr,
):
    """The second half: the meta-update with a total over all tasks, shift, reset. Grid: one program a shared tile."""
    mine = tiles + tl.program_id(0).to(tl.int64) * TILE
    column, left = tl.multiple_of(tl.load(mine), 16), tl.load(mine + 1)
    h, buffers = hyper + tl.load(mine + 3) * HYPER, (theta, None, master, stride)
    if left >= BLOCK:
        _columns_finish(buffers, phi, total, h, column, BLOCK, mode, T, ROWS, BLOCK, WORK)
    else:
        _columns_finish(buffers, phi, total, h, column, left, mode, T, ROWS, BLOCK, WORK)
