"""What a masked step costs beside a dense one, by a TPU's compiler or a clock.

  python -m experiments.benchmarks.masked_step
  python -m experiments.benchmarks.masked_step --run --size=1024 --batch=128 \
      --dtype=float32

Three layers, AdamW, donated, all methods at 90%. The first needs no TPU (pip
install libtpu): its compiler states the temporary memory of the step and the
cycles that it expects, which launch/cycles.py adds up: an estimate, but one
without noise. With --run the steps run here instead, interleaved. The rows
`by_hand` know nothing of the library: they show what any step costs that reads
its weights through a mask, or trusts that they are 0 outside of it, as the rows
`trusting` do (`trust_zeros` of `with_method`). Recorded: README.md beside this
file.
"""

import functools
import os
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import optax

import sparse_jax
from experiments import reporting
from experiments.benchmarks import timing
from launch import compiling
from launch import cycles

_RUN = flags.DEFINE_bool('run', False, 'Times the steps on the device that is '
                         'here, instead of compiling them for a TPU.')
_AOT = flags.DEFINE_string('aot', 'v5e:2x2', 'The TPU topology, of which one '
                           'chip is compiled for.')
_SIZE = flags.DEFINE_integer('size', 2048, 'Width of the three layers.')
_BATCH = flags.DEFINE_integer('batch', 8192, 'Rows of the input.')
_DTYPE = flags.DEFINE_enum('dtype', 'bfloat16', ['bfloat16', 'float32'],
                           'In which products are made; parameters are '
                           'float32.')
_METHODS = flags.DEFINE_list('methods', [], 'Only these; all if empty.')
_PROCESSOR = flags.DEFINE_bool('processor', False, 'With --run: times of the '
                               'processors, not of the clock. Other programs '
                               'on the machine disturb them less.')
_BOUND = flags.DEFINE_bool('bound_grown', True, 'As of `sparsify`.')
_ROUNDS = flags.DEFINE_integer('rounds', 60, 'Timings of each contender.')


def loss(weights, x):
  for i in range(3):
    layer = jax.tree.map(lambda w: w.astype(x.dtype), weights[f'layer{i}'])
    x = jax.nn.relu(x @ layer['kernel'] + layer['bias'])
  return jnp.mean(jnp.square(x.astype(jnp.float32)))


def problem(size: int, batch: int):
  """Parameters and an input."""
  draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
  layer = lambda i: {'kernel': draw(i, size, size) * (2 / size)**.5,
                     'bias': jnp.zeros(size)}
  return {f'layer{i}': layer(i) for i in range(3)}, draw(9, batch, size).astype(
      _DTYPE.value)


def trusting(method):
  """`training_step` of weights that are read as they are stored."""
  start, step = timing.training_step(loss, method, optax.adamw(1e-3),
                                     bound_grown=_BOUND.value,
                                     trust_zeros=True)

  def zeroed(params):
    params, opt_state = start(params)
    return method.read(params, opt_state), opt_state

  return zeroed, step


def by_hand(*, reads_mask: bool):
  """A step of `training_step` in plain JAX: a fixed mask and nothing else.

  If it does not read the mask, the forward pass trusts that the weights are 0
  outside of it, where a masked gradient and AdamW leave them.
  """
  optimizer = optax.adamw(1e-3)

  def masked(weights, masks):
    return {name: layer | {'kernel': jnp.where(masks[name] > 0,
                                               layer['kernel'], 0)}
            for name, layer in weights.items()}

  def start(params):
    masks = {name: (jax.random.uniform(
        jax.random.key(i), layer['kernel'].shape) >= .9).astype(jnp.uint8)
             for i, (name, layer) in enumerate(params.items())}
    params = masked(params, masks)
    return (params, optimizer.init(params)), masks

  def step(state, x):
    (params, slots), masks = state
    if reads_mask:
      grads = jax.grad(lambda params: loss(masked(params, masks), x))(params)
    else:
      grads = masked(jax.grad(loss)(params, x), masks)
    updates, slots = optimizer.update(grads, slots, params)
    return (optax.apply_updates(params, updates), slots), masks

  return start, step


def estimated(chosen) -> list[dict]:
  """Rows of the table, by the compiler of a TPU that is not there."""
  os.environ.update(compiling.ENVIRONMENT)
  device, = compiling.mesh_of(_AOT.value, chips=1).devices.flat
  chip = cycles.CHIPS[device.device_kind]
  params, x = jax.eval_shape(lambda: problem(_SIZE.value, _BATCH.value))
  rows = []
  for name, (start, step) in chosen.items():
    compiled = jax.jit(step, donate_argnums=0).lower(*compiling.placed(
        (jax.eval_shape(start, params), x),
        jax.sharding.SingleDeviceSharding(device))).compile()
    ordinary, refresh = (cycles.count(compiled.as_text(), chip,
                                      dearest=dear).cycles / 1e3
                         for dear in (False, True))
    rows.append({'method': name, 'thousand cycles': ordinary,
                 'ordinary step': ordinary, 'with refresh': refresh,
                 'temporaries MiB': timing.temporaries(compiled)})
  return rows


def measured(chosen) -> list[dict]:
  """Rows of the table, by a clock."""
  timing.keep_freed_memory()
  params, x = problem(_SIZE.value, _BATCH.value)
  ready = {name: timing.runner(*steps, params, x)
           for name, steps in chosen.items()}
  # Fewer steps than a period: none of them refreshes.
  times = timing.interleaved_medians(
      {name: run for name, (run, *_) in ready.items()},
      rounds=min(_ROUNDS.value, 97),
      clock=time.process_time if _PROCESSOR.value else time.perf_counter)
  return [{'method': name, 'milliseconds': 1e3 * seconds,
           'ordinary step': seconds,
           'temporaries MiB': timing.temporaries(ready[name][-1])}
          for name, seconds in times.items()]


def main(_):
  every = {'update_every': 100}
  step_of = functools.partial(timing.training_step, loss,
                              optimizer=optax.adamw(1e-3),
                              bound_grown=_BOUND.value)
  methods = timing.methods(every) | {'snfs': sparse_jax.snfs(.9, **every)}
  chosen = timing.chosen({
      'dense': step_of(methods['dense'])} | {
       'by_hand': by_hand(reads_mask=True),
       'by_hand_unread': by_hand(reads_mask=False)} | {
      name: step_of(method) for name, method in methods.items()
  } | {f'{name}_trusting': trusting(methods[name])
       for name in ('static', 'set', 'rigl')}, _METHODS.value)
  rows = measured(chosen) if _RUN.value else estimated(chosen)
  dense = dict(rows[0])
  for row in rows:
    row |= {name: row[name] / dense['ordinary step']
            for name in ('ordinary step', 'with refresh') if name in row}
    row['above dense MiB'] = row['temporaries MiB'] - dense['temporaries MiB']
  print(reporting.markdown_table(rows, formats={
      'thousand cycles': ',.0f', 'milliseconds': '.1f',
      'ordinary step': '.3f', 'with refresh': '.3f',
      'temporaries MiB': '.1f', 'above dense MiB': '.1f'}))


if __name__ == '__main__':
  app.run(main)
