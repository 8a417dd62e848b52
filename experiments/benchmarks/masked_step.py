"""What a masked step costs beside a dense one, by a TPU's compiler or a clock.

  python -m experiments.benchmarks.masked_step
  python -m experiments.benchmarks.masked_step --run --size=1024 --batch=128 \
      --dtype=float32

Three layers, AdamW, donated, all methods at 90%. The first needs no TPU (pip
install libtpu): its compiler compiles the step and states the cycles that it
expects of every instruction, and the temporary memory. A loop counts as often
as it turns; of a conditional the cheaper branch is the ordinary step and the
dearer one the refresh. Sorts and kernels carry no cycles. It is an estimate,
but one without noise. With --run the steps run here instead, interleaved.
Recorded: README.md beside this file.
"""

import collections
import os
import re

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import optax

import sparse_jax
from experiments import reporting
from experiments.benchmarks import timing

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
_ROUNDS = flags.DEFINE_integer('rounds', 60, 'Timings of each contender.')

# Rows that carry no time of their own: what they call is counted there.
_CALLS = {'while': ('body', 'condition'), 'call': ('to_apply',),
          'async-start': ('calls',)}


def methods() -> dict[str, sparse_jax.SparseMethod]:
  every = dict(update_every=100)
  return {
      'dense': sparse_jax.dense(), 'static': sparse_jax.static(.9),
      'top_kast': sparse_jax.top_kast(.9, backward_sparsity=.8, **every),
      'set': sparse_jax.set_(.9, **every),
      'rigl': sparse_jax.rigl(.9, **every),
      'snfs': sparse_jax.snfs(.9, **every),
      'gmp': sparse_jax.gmp(.9, update_end=10**6, **every)}


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


def stepper(method):
  """The transformation and the step that a user would write."""
  tx = sparse_jax.sparsify(optax.adamw(1e-3), method)

  def step(params, opt_state, x):
    grads = jax.grad(lambda params: sparse_jax.with_method(
        loss, method, opt_state)(params, x))(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  return tx, jax.jit(step, donate_argnums=(0, 1))


def cycles(text: str, branch=min) -> int:
  """The cycles that XLA expects of a compiled TPU program.

  Args:
    text: of `compiled.as_text()`.
    branch: which branch of a conditional counts: min or max.
  """
  bodies, own = collections.defaultdict(list), None
  for line in text.splitlines():
    head = re.match(r'(ENTRY )?%?([\w.\-]+) .*\{$', line)
    if head and not line.startswith(' '):
      own = 'ENTRY' if head[1] else head[2]
    elif own and line.startswith(' '):
      bodies[own].append(line)

  def total(name: str) -> int:
    return sum(map(of, bodies[name]))

  def named(line, key):
    return re.findall(rf'\b{key}=%?([\w.\-]+)', line)

  def of(line: str) -> int:
    kind = re.search(r'[}\])] ([a-z][\w\-]*)\(', line)
    kind = kind[1] if kind else ''
    if kind == 'conditional':
      several = re.search(r'branch_computations=\{([^}]*)\}', line)
      names = (re.findall(r'%?([\w.\-]+)', several[1]) if several else
               named(line, 'true_computation')
               + named(line, 'false_computation'))
      return branch(map(total, names))
    times = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    inner = sum(total(name) for key in _CALLS.get(kind, ())
                for name in named(line, key))
    stated = re.search(r'"estimated_cycles":"(\d+)"', line)
    alone = int(stated[1]) if stated and kind not in _CALLS else 0
    return alone + inner * (int(times[1]) if times else 1)

  return total('ENTRY')


def compiled_for(topology: str, method, shapes):
  """The step of one chip, by the compiler of a TPU that is not there."""
  os.environ.update(TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1')
  from jax.experimental import topologies
  device = topologies.get_topology_desc(
      platform='tpu', topology_name=topology).devices[0]
  place = jax.sharding.SingleDeviceSharding(device)
  params, x = shapes
  tx, step = stepper(method)
  args = (*jax.eval_shape(
      lambda params: sparse_jax.start(tx, method, params), params), x)
  args = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=place), args)
  return step.lower(*args).compile()


def estimated(chosen) -> list[dict]:
  """Rows of the table, by the compiler."""
  shapes = jax.eval_shape(lambda: problem(_SIZE.value, _BATCH.value))
  rows, base = [], None
  for name, method in chosen.items():
    compiled = compiled_for(_AOT.value, method, shapes)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    now = {'cycles': cycles(text), 'refresh': cycles(text, max),
           'temporaries': memory.temp_size_in_bytes / 2**20}
    base = base or now
    rows.append({
        'method': name, 'thousand cycles': now['cycles'] / 1e3,
        'ordinary step': now['cycles'] / base['cycles'],
        'with refresh': now['refresh'] / base['cycles'],
        'temporaries MiB': now['temporaries'],
        'above dense MiB': now['temporaries'] - base['temporaries']})
  return rows


def measured(chosen) -> list[dict]:
  """Rows of the table, by the clock."""
  timing.keep_freed_memory()
  params, x = problem(_SIZE.value, _BATCH.value)
  ready, memory = {}, {}

  def contender(name, method):
    tx, step = stepper(method)
    state = list(sparse_jax.start(tx, method, jax.tree.map(jnp.copy, params)))
    run = step.lower(*state, x).compile()
    memory[name] = run.memory_analysis().temp_size_in_bytes / 2**20

    def once():
      state[:] = run(*state, x)
      return state

    return once

  for name, method in chosen.items():
    ready[name] = contender(name, method)
  # Fewer steps than a period: none of them refreshes.
  times = timing.interleaved_medians(ready, rounds=min(_ROUNDS.value, 97))
  return [{'method': name, 'milliseconds': 1e3 * seconds,
           'ordinary step': seconds / times['dense'],
           'temporaries MiB': memory[name],
           'above dense MiB': memory[name] - memory['dense']}
          for name, seconds in times.items()]


def main(_):
  chosen = {name: method for name, method in methods().items()
            if name == 'dense' or not _METHODS.value or name in _METHODS.value}
  rows = measured(chosen) if _RUN.value else estimated(chosen)
  formats = {'thousand cycles': ',.0f', 'milliseconds': '.1f',
             'ordinary step': '.3f', 'with refresh': '.3f',
             'temporaries MiB': '.1f', 'above dense MiB': '.1f'}
  print(reporting.markdown_table(rows, formats={
      name: form for name, form in formats.items() if name in rows[0]}))


if __name__ == '__main__':
  app.run(main)
