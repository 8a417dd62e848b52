"""Packed storage: the packed run is the masked run with the same blocks."""

import functools
import re
import tempfile
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
from flax import linen as nn
from flax import serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import checkpointing
import sparse_jax
from sparse_jax import rules
from sparse_jax.blocks import products as block_products

BLOCK = sparse_jax.Block((4, 4))
EVERY = dict(structure=BLOCK, update_every=2)
METHODS = {
    'static': sparse_jax.static(.5, structure=BLOCK),
    'fixed': sparse_jax.fixed({'Dense_1/kernel': np.kron(
        [[1, 0, 1], [0, 1, 0]], np.ones((4, 4)))[:, :10] > 0},
                              structure=BLOCK),
    'set_': sparse_jax.set_(.5, **EVERY),
    'rigl': sparse_jax.rigl(.5, **EVERY),
    'mest': sparse_jax.mest(.5, mutation=(.25,), **EVERY),
    'rigl_skip_step': sparse_jax.rigl(.5, skip_step=True, **EVERY),
    'top_kast': sparse_jax.top_kast(.75, backward_sparsity=.5, **EVERY),
    'top_kast_random': sparse_jax.top_kast(
        .75, backward_sparsity=.5, backward_selection='random', **EVERY),
    'top_kast_stops': sparse_jax.top_kast(
        .75, backward_sparsity=.5, stop_exploration_at=3, **EVERY),
    'dnw': sparse_jax.dnw(.75, structure=BLOCK),
    'balanced': sparse_jax.rigl(
        .5, structure=sparse_jax.Block((4, 4), balanced=True),
        update_every=2),
}
OPTIMIZERS = {
    'sgd': optax.sgd(.1), 'momentum': optax.sgd(.1, momentum=.9),
    'adam': optax.adam(1e-2),
    'adamw_clipped': optax.chain(optax.clip_by_global_norm(.1),
                                 optax.adamw(1e-2)),
}


class Mlp(nn.Module):
  """Tiles of 4 x 4 hang over the edges of the second kernel."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(6)(nn.relu(nn.Dense(10)(x)))


def batch(step, shape=(16, 8), out=(16, 6)):
  rng = np.random.default_rng(step)
  return [jnp.asarray(rng.normal(size=size), jnp.float32)
          for size in (shape, out)]


@functools.cache
def mlp_params():
  return jax.jit(Mlp().init)(jax.random.key(2), batch(0)[0])['params']


def make_step(method, tx, apply=Mlp().apply):
  def step(params, opt_state, x, y):
    def loss(params):
      fn = sparse_jax.with_method(apply, method, opt_state)
      return jnp.mean((fn({'params': params}, x) - y)**2)

    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value

  return step


def train(method, optimizer, *, params=None, apply=Mlp().apply, steps=5,
          batches=batch):
  tx = sparse_jax.sparsify(optimizer, method, key=1)
  params, opt_state = sparse_jax.start(tx, method, params or mlp_params())
  step = jax.jit(make_step(method, tx, apply), donate_argnums=(0, 1))
  params = jax.tree.map(jnp.array, params)
  for t in range(steps):
    params, opt_state, _ = step(params, opt_state, *batches(t))
  return params, opt_state, step._cache_size()


def assert_same_run(test, method, one, two, rtol=2e-5):
  """Masked and packed: equal marks, and weights to rounding."""
  packed = sparse_jax.packed(method)
  marks = [jax.tree.leaves(sparse_jax.get_state(run[1]).marks)
           for run in (one, two)]
  test.assertNotEmpty(marks[0])
  jax.tree.map(np.testing.assert_array_equal, *marks)
  jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-5),
      sparse_jax.dense_weights(method, *one[:2]),
      sparse_jax.dense_weights(packed, *two[:2]))


def _through_a_file(state, like, library):
  """What a new process reads, that has only what `start` makes."""
  if library == 'flax':
    return serialization.from_bytes(like, serialization.to_bytes(state))
  with tempfile.TemporaryDirectory() as folder:
    with checkpointing.Checkpoints(folder, save_every=1, config={}) as target:
      target.save(1, state)
    with checkpointing.Checkpoints(folder, save_every=1, config={}) as source:
      return source.restore_latest(checkpointing.abstract(like))[0]


def _ids(state):
  """Where the stored blocks of each leaf belong."""
  return [place.ids for place in sparse_jax.get_state(state[1]).packed.values()]


class PackedIsMaskedTest(parameterized.TestCase):

  @parameterized.parameters(*METHODS)
  def test_every_method(self, name):
    method, optimizer = METHODS[name], OPTIMIZERS['adamw_clipped']
    one, two = (train(each, optimizer)
                for each in (method, sparse_jax.packed(method)))
    assert_same_run(self, method, one, two)
    self.assertEqual((one[2], two[2]), (1, 1), 'compilations')

  @parameterized.product(name=('set_', 'top_kast'),
                         optimizer=('sgd', 'momentum', 'adam'))
  def test_every_optimizer(self, name, optimizer):
    method = METHODS[name]
    one, two = (train(each, OPTIMIZERS[optimizer])
                for each in (method, sparse_jax.packed(method)))
    assert_same_run(self, method, one, two)

  @parameterized.parameters('set_', 'top_kast')
  def test_gradients_may_be_accumulated_outside(self, name):
    """RigL excepted: its scores are then averages of magnitudes."""
    method, runs = METHODS[name], []
    for each in (method, sparse_jax.packed(method)):
      tx = optax.MultiSteps(sparse_jax.sparsify(optax.sgd(.1), each, key=1), 2)
      state = sparse_jax.start(tx, each, mlp_params())
      step = jax.jit(make_step(each, tx))
      for t in range(6):
        state = step(*state, *batch(t))[:2]
      runs.append(state)
    assert_same_run(self, method, *runs)

  def test_slots_are_those_of_the_masked_run(self):
    method = METHODS['rigl']
    one, two = (train(each, OPTIMIZERS['momentum'])
                for each in (method, sparse_jax.packed(method)))
    plan = sparse_jax.get_state(two[1]).plan
    for layer in ('Dense_0', 'Dense_1'):
      path = f'{layer}/kernel'
      dense = one[1].inner[0].trace[layer]['kernel']
      slots = two[1].inner[0].trace[layer]['kernel'].blocks
      tall, wide = (-(-n // 4) for n in plan.by_path[path].layout.shape)
      full = np.zeros((tall * 4, wide * 4), np.float32)
      full[:dense.shape[0], :dense.shape[1]] = dense
      tiles = full.reshape(tall, 4, wide, 4).swapaxes(1, 2).reshape(-1, 4, 4)
      ids = two[1].sparse.packed[path].ids
      np.testing.assert_allclose(slots, tiles[ids], rtol=2e-5, atol=1e-6)

  @parameterized.parameters('static', 'top_kast')
  def test_saved_and_restored_it_goes_on_bit_for_bit(self, name):
    method = sparse_jax.packed(METHODS[name])
    tx = sparse_jax.sparsify(OPTIMIZERS['adam'], method, key=1)
    run = jax.jit(make_step(method, tx))
    state = sparse_jax.start(tx, method, mlp_params())
    for t in range(4):
      if t == 2:  # Saved: NumPy arrays in the structure that `start` makes.
        kept = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
        like = jax.eval_shape(
            lambda params: sparse_jax.start(tx, method, params), mlp_params())
        fresh = sparse_jax.start(tx, method, mlp_params())
        self.assertEqual(jax.tree.structure(like), jax.tree.structure(state))
        again = jax.tree.map(lambda leaf, old: jax.device_put(
            old, leaf.sharding), fresh, jax.tree.unflatten(
                jax.tree.structure(fresh), kept))
      state = run(*state, *batch(t))[:2]
      if t >= 2:
        again = run(*again, *batch(t))[:2]
    jax.tree.map(np.testing.assert_array_equal, again, state)

  @parameterized.product(name=('rigl', 'set_'),
                         through=('flax', 'orbax'))
  def test_restored_from_a_file_masks_move_on_as_unbroken(self, name, through):
    """Saved between two refreshes, restored into what `start` makes anew."""
    method = sparse_jax.packed(METHODS[name])
    tx = sparse_jax.sparsify(OPTIMIZERS['adam'], method, key=4)
    run = jax.jit(make_step(method, tx))
    start = lambda: jax.device_put(sparse_jax.start(tx, method, mlp_params()))
    state, states = start(), []
    for t in range(7):
      state = run(*state, *batch(t))[:2]
      states.append(state)
    again = _through_a_file(states[2], start(), through)
    jax.tree.map(np.testing.assert_array_equal, again, states[2])
    for t in range(3, 7):
      again = run(*again, *batch(t))[:2]
      jax.tree.map(np.testing.assert_array_equal, again, states[t])
    self.assertEqual(jax.tree.structure(again), jax.tree.structure(state))
    ids = [_ids(saved) for saved in (states[2], states[6])]
    self.assertTrue(any(np.any(x != y) for x, y in zip(*ids)))

  def test_seeds_side_by_side_are_the_runs_of_each(self):
    method = sparse_jax.packed(METHODS['set_'])

    def run(seed):
      tx = sparse_jax.sparsify(optax.sgd(.1), method, key=seed)
      state = sparse_jax.start(tx, method, mlp_params())
      step = make_step(method, tx)

      def body(state, xy):
        return step(*state, *xy)[:2], None

      xy = [jnp.stack(each) for each in zip(*map(batch, range(3)))]
      state, _ = jax.lax.scan(body, state, xy)
      return sparse_jax.dense_weights(method, *state)

    keys = jax.random.split(jax.random.key(3), 2)
    both, one = jax.jit(jax.vmap(run))(keys), jax.jit(run)
    for i in range(2):
      jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5),
                   jax.tree.map(lambda leaf: leaf[i], both), one(keys[i]))
    kernels = both['Dense_0']['kernel']
    self.assertFalse(np.array_equal(kernels[0] != 0, kernels[1] != 0))


class CastTest(parameterized.TestCase):

  def test_parameters_may_be_cast_to_bfloat16_as_one_tree(self):
    """Growth scores with them, before a scan over parts of the batch, say."""
    method = sparse_jax.packed(sparse_jax.rigl(.5, **EVERY))
    tx = sparse_jax.sparsify(optax.sgd(.1), method)
    params, state = sparse_jax.start(tx, method, mlp_params())
    inputs, _ = batch(0)

    def loss_fn(params):
      apply = sparse_jax.with_method(Mlp().apply, method, state)
      return jnp.sum(apply({'params': params}, inputs))

    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    grads = jax.jit(jax.grad(loss_fn))(half)
    self.assertEqual({leaf.dtype for leaf in jax.tree.leaves(grads)},
                     {jnp.dtype(jnp.bfloat16)})


class MemoryTest(parameterized.TestCase):

  @parameterized.parameters('static', 'rigl', 'top_kast')
  def test_no_array_of_a_dense_weights_size_is_in_the_program(self, name):
    """Top-KAST's reservoir excepted, which lies in the host's memory."""
    method = sparse_jax.packed(METHODS[name])
    tx = sparse_jax.sparsify(optax.sgd(.1), method)
    params = {'kernel': jnp.ones((48, 44))}  # Of 132 tiles.
    params, opt_state = sparse_jax.start(tx, method, params)
    apply = lambda variables, x: x @ variables['params']['kernel']
    text = jax.jit(make_step(method, tx, apply)).lower(
        params, opt_state, jnp.ones((3, 48)),
        jnp.ones((3, 44))).compile().as_text()
    sizes = [np.prod([int(n) for n in dims.split(',')], dtype=int)
             for dims in re.findall(r'\bf32\[([\d,]+)\]', text)
             if dims != '132,4,4' or name != 'top_kast']
    self.assertNotEmpty(sizes)
    self.assertLess(max(sizes), 48 * 44)


class Stacked(nn.Module):
  """Two layers of one scan."""

  @nn.compact
  def __call__(self, x):
    class Layer(nn.Module):

      @nn.compact
      def __call__(self, x, _):
        return nn.tanh(nn.Dense(8, name='dense')(x)), None

    layers = nn.scan(Layer, variable_axes={'params': 0},
                     split_rngs={'params': True}, length=2)
    return layers(name='layers')(x, None)[0]


class Attention(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.MultiHeadDotProductAttention(2, qkv_features=8, name='attend')(x)


class Image(nn.Module):

  @nn.compact
  def __call__(self, x):
    return nn.Dense(4)(nn.relu(nn.Conv(8, (3, 3))(x)).mean((1, 2)))


KERNELS = {
    'stacked': (Stacked(), (5, 8), (5, 8),
                dict(batch_axes=lambda path, leaf: (0,))),
    'attention': (Attention(), (2, 5, 8), (2, 5, 8), {}),
    'convolution': (Image(), (2, 4, 4, 4), (2, 4), {}),
}


class KernelTest(parameterized.TestCase):

  def test_products_are_told_of_heads(self):
    """Which TPUs read and write one by one: attention copies nothing."""
    method = sparse_jax.packed(sparse_jax.static(.5, structure=BLOCK))
    tx = sparse_jax.sparsify(optax.sgd(.1), method)
    x, told = jnp.ones((2, 5, 8)), []

    def matmul(*args, heads, **options):
      told.append(heads)
      return own(*args, heads=heads, **options)

    own = block_products.matmul
    params = jax.jit(Attention().init)(jax.random.key(0), x)['params']
    params, state = sparse_jax.start(tx, method, params)
    with mock.patch.object(block_products, 'matmul', matmul):
      jax.eval_shape(sparse_jax.with_method(Attention().apply, method, state),
                     {'params': params}, x)
    self.assertEqual(told, [(None, 4)] * 3 + [(4, None)])

  @parameterized.product(kernel=tuple(KERNELS), make=('set_', 'top_kast'))
  def test_other_kernels_than_those_of_dense_layers(self, kernel, make):
    model, shape, out, keywords = KERNELS[kernel]
    extra = dict(backward_sparsity=.25) if make == 'top_kast' else {}
    method = getattr(sparse_jax, make)(.5, **EVERY, **extra, **keywords)
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones(shape))['params']
    one, two = (train(each, optax.sgd(.1), params=params, apply=model.apply,
                      steps=3, batches=lambda t: batch(t, shape, out))
                for each in (method, sparse_jax.packed(method)))
    assert_same_run(self, method, one, two, rtol=1e-4)


class Tall(sparse_jax.Block):
  """A user's structure: blocks by another name."""


class OwnTest(parameterized.TestCase):

  @parameterized.parameters(BLOCK, Tall((2, 4)))
  def test_a_users_method_runs_masked_and_packed(self, structure):
    def choose(leaf, now):
      stay = leaf.top(now.magnitudes, leaf.count // 2, among=now.active)
      return stay | leaf.top(now.random, leaf.count - leaf.count // 2,
                             among=~stay)

    method = rules.make_method(rules.Rule(
        'half', rules.Sites(.5, structure=structure), choose,
        first=rules.random_first, zeros=True,
        refreshes=lambda step: step % 2 == 0))
    one, two = (train(each, optax.sgd(.1), steps=4)
                for each in (method, sparse_jax.packed(method)))
    assert_same_run(self, method, one, two)


class RefusalTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ('unstructured', lambda: sparse_jax.static(.5), 'Block'),
      ('learned', sparse_jax.str_, 'one rule'),
      ('gmp', lambda: sparse_jax.gmp(
          .5, structure=BLOCK, update_end=4), 'masks tighten'),
      ('gmp at once', lambda: sparse_jax.gmp(.5, structure=BLOCK),
       'hidden weights come back'))
  def test_a_method_that_cannot_be_packed_says_why(self, make, why):
    with self.assertRaisesRegex(ValueError, f'`method`.*{why}'):
      sparse_jax.packed(make())

  @parameterized.parameters('snip', 'grasp')
  def test_what_a_first_batch_chose_is_packed_as_the_error_says(self, name):
    """Then training is that of the masked run, which skips its first step."""
    found = getattr(sparse_jax, name)(.5, structure=BLOCK, skip_step=True)
    with self.assertRaisesRegex(ValueError, re.escape(
        'state = tx.update(grads, tx.init(params), params)[1], and pack those, '
        'packed(fixed(get_state(state).forward_masks, structure=...))')):
      sparse_jax.packed(found)

    tx = sparse_jax.sparsify(OPTIMIZERS['adam'], found)

    @jax.jit
    def step(params, state, x, y):
      grad_fn = jax.grad(lambda params: jnp.mean(
          (Mlp().apply({'params': params}, x) - y)**2))
      updates, state = tx.update(grad_fn(params), state, params,
                                 grad_fn=grad_fn)
      return optax.apply_updates(params, updates), state

    one = step(mlp_params(), tx.init(mlp_params()), *batch(9))
    method = sparse_jax.packed(sparse_jax.fixed(
        sparse_jax.get_state(one[1]).forward_masks, structure=BLOCK))
    for t in range(3):
      one = step(*one, *batch(t))
    two = train(method, OPTIMIZERS['adam'], steps=3)[:2]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5,
                                   atol=1e-5),
                 sparse_jax.dense_weights(found, *one),
                 sparse_jax.dense_weights(method, *two))

  def test_a_state_of_another_method_or_tree_is_refused(self):
    method, other = METHODS['static'], METHODS['set_']
    params = {'a': {'kernel': jnp.ones((8, 8))}}
    state = method.init(params)
    with self.assertRaisesRegex(ValueError, "'static'.*'set_'"):
      other.read(params, state)
    for wrong in ({'b': {'kernel': jnp.ones((8, 8))}},
                  {'a': {'kernel': jnp.ones((8, 4))}}):
      with self.assertRaisesRegex(ValueError, "`params`.*'a/kernel'"):
        method.read(wrong, state)

  def test_two_leaves_of_one_path_are_refused(self):
    with self.assertRaisesRegex(ValueError, 'a/b'):
      METHODS['static'].init({'a': {'b': jnp.ones((8, 8))},
                              'a/b': jnp.ones((8, 8))})

  def test_an_integer_leaf_chosen_by_name_is_refused(self):
    method = sparse_jax.static(.5, is_sparse=(('ids', True), ('.*', False)))
    with self.assertRaisesRegex(ValueError, 'ids'):
      method.init({'ids': jnp.ones((4, 4), jnp.int32)})


if __name__ == '__main__':
  absltest.main()
