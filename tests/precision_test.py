"""16-bit parameters, mixed dtypes, 64-bit mode and numbers that overflow."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_jax
from sparse_jax import trees
from tests import methods_test

HALVES = (jnp.bfloat16, jnp.float16)
LAYERS = {'conv': jnp.bfloat16, 'dense': jnp.float16}
METHODS = {name: row() for name, row in methods_test.METHODS.items()}
MAIN = {name: METHODS[name] for name in methods_test.SPARSE
        if name not in methods_test.VARIANTS}
# Each leaf has a count of its own that is known beforehand.
COUNTED = tuple(name for name in methods_test.SPARSE if name not in (
    *methods_test.SHARED, *methods_test.LEARNED, *methods_test.OWN_COUNTS))
SMALL = dict(conv=(2, 2, 2, 4), dense=(4, 6))
# Tiles that are cut at an edge, and tiles alone.
BLOCKS = {'max': sparse_jax.Block((3, 4), reduce='max'),
          'packed': sparse_jax.Block((2, 3))}
STORED = METHODS | {
    f'{name}_{kind}': (sparse_jax.packed if kind == 'packed' else lambda m: m)(
        methods_test.METHODS[name](structure=block))
    for name in ('rigl', 'top_kast', 'dnw') for kind, block in BLOCKS.items()}


@functools.cache
def train():
  """Six steps of every method, one layer in each of the dtypes."""
  params = methods_test.fake_params()
  params = {layer: jax.tree.map(lambda p: p.astype(LAYERS[layer]), leaves)
            for layer, leaves in params.items()}
  return methods_test.run_many(METHODS, params,
                               # Its own 1e-8 is 0 in float16.
                               optimizer=optax.adam(.05, eps=1e-3),
                               options=methods_test.QUICK)


def dtype_of(path):
  """Of a leaf of `train`; thresholds and gates are kept in 32 bits."""
  return jnp.float32 if path.startswith(('thresholds', 'gates')) else (
      LAYERS[path.split('/')[0]])


def kernel_of(values, dtype):
  return {'kernel': jnp.asarray(values, dtype)}


def returned_by(tx):
  """A compiled step from given gradients, with the parameters returned."""
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params,
                               grad_fn=methods_test.itself)
    return optax.apply_updates(params, updates), state

  return jax.jit(step, compiler_options=methods_test.QUICK)


class HalfTest(parameterized.TestCase):

  @parameterized.parameters(*METHODS)
  def test_parameters_gradients_and_state_keep_their_dtypes(self, name):
    done = train()[name]
    for tree in (done.params, done.moments[-1].grads):
      for path, leaf in trees.leaves_by_path(tree).items():
        self.assertEqual(leaf.dtype, dtype_of(path), path)
    after = jax.tree.map(jax.typeof, (done.params, done.state))
    self.assertEqual(after, done.first_state)
    self.assertEqual(done.compilations, 1)

  @parameterized.parameters(*COUNTED)
  def test_counts_are_exact(self, name):
    for step, seen in enumerate(train()[name].moments):
      self.assertEqual(
          {path: (int(seen.forward[path].sum()),
                  int(seen.backward[path].sum())) for path in seen.forward},
          methods_test.expected_counts(name, sparse_jax.uniform, step))

  @parameterized.parameters(*methods_test.BY_MAGNITUDE)
  def test_masks_are_the_ranking_of_the_parameters_returned(self, name):
    """In bfloat16 weights tie, so that a sum kept in 32 bits ranks others."""
    for step, seen in enumerate(train()[name].moments):
      if step not in ((0, 2, 4, 5) if name == 'gmp_cubic' else (0, 2, 4, 6)):
        continue
      wanted = methods_test.expected_counts(name, sparse_jax.uniform, step)
      for path, (forward, backward) in wanted.items():
        scores = np.abs(seen.params[path].astype(np.float64))
        if dtype_of(path) == jnp.bfloat16:
          self.assertLess(np.unique(scores).size, scores.size)
        for mask, count in ((seen.forward[path], forward),
                            (seen.backward[path], backward)):
          np.testing.assert_array_equal(
              mask, methods_test.slow_top(scores, count), str(step))

  @parameterized.parameters(*methods_test.ZEROS)
  def test_weights_outside_the_mask_are_zero(self, name):
    for seen in train()[name].moments[1:]:
      for path, mask in seen.forward.items():
        self.assertFalse(np.any(seen.params[path][~mask]))

  @parameterized.parameters(*(
      name for name in methods_test.SPARSE if name not in methods_test.ZEROS))
  def test_weights_outside_the_backward_set_are_bit_identical(self, name):
    moments = train()[name].moments
    for old, new in zip(moments, moments[1:]):
      for path, mask in old.backward.items():
        np.testing.assert_array_equal(
            methods_test.bits(new.params[path])[~mask],
            methods_test.bits(old.params[path])[~mask])

  @parameterized.parameters(jnp.float16, jnp.float32)
  def test_subnormal_float16_weights_are_ranked(self, updates):
    """Below 6e-5 float16 is subnormal; weights may well be that small."""
    tiny = np.arange(1, 25, dtype=np.float16).reshape(4, 6) * np.float16(6e-8)
    params = kernel_of(tiny[::-1], jnp.float16)
    cast = optax.stateless_with_tree_map(lambda g, p: g.astype(updates))
    tx = sparse_jax.sparsify(optax.chain(cast, optax.sgd(0.)),
                             sparse_jax.dnw(.75))
    zeros = jax.tree.map(jnp.zeros_like, params)
    params, state = returned_by(tx)(params, tx.init(params), zeros)
    np.testing.assert_array_equal(
        state.sparse.forward_masks['kernel'],
        methods_test.slow_top(np.abs(np.asarray(params['kernel'])), 6))

  def test_refresh_keeps_subnormal_float16_weights(self):
    params = kernel_of(np.full((4, 6), 3e-6), jnp.float16)
    method = sparse_jax.dnw(.75)
    after, _ = method.refresh(params, params, method.init(params))
    np.testing.assert_array_equal(after['kernel'], params['kernel'])


class MixedTest(parameterized.TestCase):

  @parameterized.product(name=methods_test.ZEROS, dtype=HALVES)
  def test_16_bit_gradients_of_32_bit_weights_leave_exact_zeros(self, name,
                                                                dtype):
    """-p rounded to the update's 16 bits would leave the rounding error."""
    params = kernel_of(np.random.default_rng(1).normal(size=(4, 6)),
                       jnp.float32)
    tx = sparse_jax.sparsify(optax.sgd(.1), METHODS[name])
    step, state = returned_by(tx), tx.init(params)
    for t in range(1, 4):
      grads = kernel_of(methods_test.fake_batch(params, t)['kernel'], dtype)
      params, state = step(params, state, grads)
      mask = np.asarray(state.sparse.forward_masks['kernel'])
      self.assertFalse(np.any(np.asarray(params['kernel'])[~mask]), t)
    self.assertEqual(params['kernel'].dtype, jnp.float32)

  @parameterized.product(name=('gmp', 'dnw', 'top_kast'), dtype=HALVES)
  def test_32_bit_updates_of_16_bit_weights_are_ranked_as_stored(self, name,
                                                                 dtype):
    widen = optax.stateless_with_tree_map(lambda g, p: g.astype(jnp.float32))
    tx = sparse_jax.sparsify(optax.chain(widen, optax.sgd(.1)), METHODS[name])
    params = kernel_of(np.random.default_rng(2).normal(size=(8, 12)), dtype)
    step, state = returned_by(tx), tx.init(params)
    for t in range(1, 5):
      params, state = step(params, state, methods_test.fake_batch(params, t))
      if t % 2 and name != 'dnw':
        continue
      scores = np.abs(np.asarray(params['kernel']).astype(np.float64))
      np.testing.assert_array_equal(state.sparse.forward_masks['kernel'],
                                    methods_test.slow_top(scores, 24))
    self.assertEqual(params['kernel'].dtype, dtype)

  @parameterized.parameters(*METHODS)
  def test_64_bit_mode_changes_no_type(self, name):
    method = METHODS[name]
    params = method.parametrize(methods_test.fake_params(**SMALL))
    tx = sparse_jax.sparsify(optax.sgd(.1, momentum=.9), method)
    update = functools.partial(tx.update, grad_fn=methods_test.itself)
    with jax.enable_x64(True):
      state = jax.eval_shape(tx.init, params)
      updates, after = jax.eval_shape(update, params, state, params)
      penalty = jax.eval_shape(method.penalty, params, state)
    self.assertEqual(after, state)
    wide = [leaf.dtype for leaf in jax.tree.leaves((updates, after, penalty))
            if leaf.dtype.itemsize == 8]
    self.assertEqual(wide, [])

  @parameterized.named_parameters(
      ('str_', lambda: sparse_jax.str_(initial=-2.), lambda w, s: (
          np.sign(w) * np.maximum(np.abs(w) - 1 / (1 + np.exp(-s)), 0))),
      ('dst', sparse_jax.dst, lambda w, t: w * (np.abs(w) > t)),
      ('cs', lambda: sparse_jax.cs(initial=-.3, temperature=7.,
                                   round_steps=4), lambda w, s: (
          w / (1 + np.exp(-7**(2 / 3) * s)) * (1 + np.exp(.3)))),
      ('powerprop', lambda: sparse_jax.powerprop(sparse_jax.static(0.), 2.5),
       None))
  def test_weights_of_64_bits_are_read_with_all_of_them(self, make, formula):
    with jax.enable_x64(True):
      weights = {'kernel': jnp.asarray(
          np.random.default_rng(0).normal(size=(6, 4)))}
      method = make()
      params = method.parametrize(weights)
      state = method.init(params)._replace(step=jnp.int32(2))
      got = method.read(params, state)['kernel']
      self.assertEqual({leaf.dtype for leaf in jax.tree.leaves(params)},
                       {np.dtype(np.float64)})
      want = weights['kernel']
      if formula is not None:
        learnt = params.get('thresholds', params.get('gates'))['kernel']
        want = formula(np.asarray(want), np.asarray(learnt))
      np.testing.assert_allclose(got, want, rtol=1e-13)
      tx = sparse_jax.sparsify(optax.adam(.1), method)
      after, _ = jax.jit(tx.update)(params, tx.init(params), params)
      self.assertEqual(after['kernel'].dtype, np.float64)

  @parameterized.parameters('set_', 'mest')
  def test_64_bit_mode_draws_the_same_masks(self, name):
    params = methods_test.fake_params(**SMALL)
    plain = METHODS[name].init(params)
    with jax.enable_x64(True):
      wide = METHODS[name].init(params)
    jax.tree.map(np.testing.assert_array_equal, wide.marks, plain.marks)

  def test_64_bit_mode_draws_the_same_numbers(self):
    grown = sparse_jax.set_(.5, grow_init='random_normal').rule.grown
    leaf = sparse_jax.rules.Sites(.5).leaves({'w': jnp.ones((4, 6))})['w']
    weight, key = jnp.arange(24.).reshape(4, 6), jax.random.key(3)
    draw = lambda: (
        sparse_jax.scores.random(weight, None, key),
        sparse_jax.operators.random_projection(key, 10, dims=4),
        grown(leaf, weight, weight > 3, key, ()))
    plain = draw()
    with jax.enable_x64(True):
      wide = draw()
    for a, b in zip(plain, wide):
      np.testing.assert_array_equal(a, b)
      self.assertEqual(b.dtype, jnp.float32)

  def test_penalty_is_float32_and_its_gradient_of_the_weights_dtype(self):
    params, method = methods_test.fake_params(jnp.bfloat16), METHODS['top_kast']
    state = method.init(params)
    value, grads = jax.value_and_grad(method.penalty)(params, state)
    self.assertEqual(value.dtype, jnp.float32)
    self.assertEqual({leaf.dtype for leaf in jax.tree.leaves(grads)},
                     {np.dtype(jnp.bfloat16)})


class FlagsTest(parameterized.TestCase):
  """What JAX can be told to forbid is not done."""

  def begin(self, name, dtype=jnp.float32):
    method = STORED[name]
    # Optax's own Adam promotes, and so do its means of squares.
    tx = sparse_jax.sparsify(optax.sgd(.1, momentum=.9), method)
    params = methods_test.fake_params(dtype, **SMALL)
    params, state = sparse_jax.start(tx, method, params)
    return method, tx, params, state

  @parameterized.product(name=tuple(STORED), dtype=(jnp.float32, jnp.bfloat16))
  def test_no_implicit_promotion(self, name, dtype):
    def step():
      method, tx, params, state = self.begin(name, dtype)

      def loss_fn(params):
        weights = sparse_jax.dense_weights(method, params, state)
        return methods_test.quadratic(weights, jax.tree.map(
            jnp.ones_like, weights))

      grads = jax.grad(loss_fn)(params)
      updates, state = tx.update(grads, state, params, grad_fn=lambda *_: (
          jax.grad(loss_fn)(params)))
      average = sparse_jax.average_params(params, optax.apply_updates(
          params, updates), state, step_size=.1)
      return average, state

    with jax.numpy_dtype_promotion('strict'):
      jax.eval_shape(step)

  def test_aged_adam_promotes_nothing(self):
    tx = sparse_jax.adam.scale_by_aged_adam(warmup_steps=3)
    params = methods_test.fake_params(jnp.bfloat16)
    with jax.numpy_dtype_promotion('strict'):
      jax.eval_shape(lambda p: tx.update(p, tx.init(p)), params)

  @parameterized.parameters(
      'rigl_max', 'top_kast', 'top_kast_packed', 'top_kast_max', 'sr_ste')
  def test_no_infinity_and_no_nan_stands_for_a_place(self, name):
    """Step by step, where JAX looks at the result of every operation."""
    # NM marks the places that a last group lacks by NaN.
    with jax.debug_infs(True), jax.debug_nans(name != 'sr_ste'):
      method, tx, params, state = self.begin(name)
      weights = sparse_jax.dense_weights(method, params, state)
      grads = jax.tree.map(jnp.ones_like, params)
      updates, state = tx.update(grads, state, params)
      jax.block_until_ready((weights, updates, state))

  def test_joint_counts_need_no_infinity(self):
    params = methods_test.fake_params(**SMALL)
    with jax.debug_infs(True), jax.debug_nans(True):
      masks = METHODS['gmp_global'].init(params).forward_masks
    self.assertEqual(sum(int(mask.sum()) for mask in jax.tree.leaves(masks)),
                     sparse_jax.keep_count(32 + 24, .75))


class DivergedTest(parameterized.TestCase):

  def test_counts_are_exact_whatever_the_weights(self):
    """A run that has diverged still has masks of the right sizes."""
    train = methods_test.trainer(MAIN, options=methods_test.QUICK)
    for bad in (np.nan, np.inf):
      params = jax.tree.map(
          lambda p: p.at[0].set(bad).at[-1].set(-bad) if p.ndim > 1 else p,
          methods_test.fake_params())
      for name, done in train(params, 3).items():
        with self.subTest(method=name, weights=bad):
          self.check_counts(name, done.moments)

  def check_counts(self, name, moments):
    for step, seen in enumerate(moments):
      counts = methods_test.counts_of(seen)
      if name in COUNTED:
        self.assertEqual(counts, methods_test.expected_counts(
            name, sparse_jax.uniform, step))
      for path in counts:
        self.assertFalse(np.any(seen.forward[path] & ~seen.backward[path]))


if __name__ == '__main__':
  absltest.main()
