"""Tests of experiments/language/models.py."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.language import adaptive
from experiments.language import models
import sparse_jax
from sparse_jax import trees
from tests import kernel_count

_VOCAB = 11


def create(**changes):
  settings = dict(vocab_size=_VOCAB, num_layers=2, d_model=8, d_ff=12,
                  d_embed=8, num_heads=2, memory_length=4)
  return models.TransformerXL(**(settings | changes))


@functools.cache
def random_params(model, seed=0):
  """Parameters, biases too, so large that everything matters."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    noise = rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[0])
    return jnp.asarray((path[-1].key == 'scale') + noise, leaf.dtype)

  tokens, memory = tokens_of(1, 1), models.init_memory(model, 1, 0)
  init = functools.partial(model.init, train=False)
  shapes = jax.eval_shape(init, jax.random.key(0), tokens, tokens, memory)
  return jax.tree_util.tree_map_with_path(draw, shapes['params'])


def tokens_of(batch, length, seed=2):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(_VOCAB, size=(batch, length)), jnp.int32)


def random_memory(model, valid, length=4, seed=3):
  rng = np.random.default_rng(seed)
  shape = (model.num_layers, len(valid), length, model.d_model)
  return models.Memory(jnp.asarray(rng.normal(size=shape), jnp.float32),
                       jnp.asarray(valid, jnp.int32))


@functools.cache
def compiled(model, train):
  def apply(params, tokens, targets, memory, key):
    return model.apply({'params': params}, tokens, targets, memory,
                       train=train, rngs={'dropout': key} if train else {})

  return jax.jit(apply)


def run(model, params, tokens, targets, memory, *, train=False, key=0):
  """Losses and the next memory."""
  return compiled(model, train)(params, tokens, targets, memory, key_of(key))


def key_of(seed):
  return jax.random.key(seed, impl='rbg')  # It compiles fast.


def normalised(p, x):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p['scale'] + (
      p['bias'])


def attention_by_hand(p, x, context, heads, memory_length, valid):
  """Attention of one stream, query by query and key by key, as published."""
  features = x.shape[-1] // heads
  rates = 10000. ** (-2 * np.arange(x.shape[-1] // 2) / x.shape[-1])
  split = lambda x: x.reshape(*x.shape[:-1], heads, features)
  q, k, v = (split(y @ p[name]['kernel']) for y, name in (
      (x, 'query'), (context, 'key'), (context, 'value')))
  out = np.zeros_like(q)
  for i in range(len(x)):
    seen = range(memory_length - valid, memory_length + i + 1)
    scores = []
    for j in seen:
      angles = (memory_length + i - j) * rates
      position = split(np.concatenate([np.sin(angles), np.cos(angles)])
                       @ p['position']['kernel'])
      scores.append(((q[i] + split(p['content_bias'])) * k[j]
                     + (q[i] + split(p['position_bias'])) * position).sum(-1))
    weights = np.exp(np.array(scores) / np.sqrt(features))
    weights /= weights.sum(0)
    out[i] = np.einsum('jh,jhd->hd', weights, v[list(seen)])
  return out.reshape(x.shape) @ p['out']['kernel']


def losses_by_hand(model, params, tokens, targets, memory):
  """Losses [t] of one stream, without cutoffs."""
  params = jax.tree.map(np.float64, params)
  remembered, valid = np.float64(memory.values[:, 0]), int(memory.valid[0])
  table = params['vocabulary']['head']
  x = table['embedding'][np.asarray(tokens[0])] * np.sqrt(model.d_model)
  for i in range(model.num_layers):
    p, context = params[f'layer_{i}'], np.concatenate([remembered[i], x])
    x = normalised(p['norm_1'], x + attention_by_hand(
        p['attention'], x, context, model.num_heads, remembered.shape[1],
        valid))
    hidden = x @ p['dense_1']['kernel'] + p['dense_1']['bias']
    x = normalised(p['norm_2'], x + np.maximum(hidden, 0)
                   @ p['dense_2']['kernel'] + p['dense_2']['bias'])
  logits = x @ table['embedding'].T + table['bias']
  logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
  return -logits[np.arange(len(x)), np.asarray(targets[0])]


class PiecesTest(parameterized.TestCase):

  @parameterized.parameters((1, 1), (1, 5), (3, 3), (4, 9), (5, 6))
  def test_relative_shift_follows_its_formula(self, queries, keys):
    scores = np.random.default_rng(0).normal(size=(2, 3, queries, keys))
    found = models.relative_shift(jnp.asarray(scores, jnp.float32))
    self.assertEqual(found.shape, scores.shape)
    for i in range(queries):
      for j in range(keys - queries + i + 1):
        np.testing.assert_array_equal(
            found[..., i, j], np.float32(scores[..., i, queries - 1 - i + j]))

  @parameterized.parameters(0, 2, 5)
  def test_mask_shows_what_is_filled_and_not_later(self, memory_length):
    valid = [v for v in (0, 1, 2, 5) if v <= memory_length]
    found = models.attention_mask(jnp.array(valid), memory_length, 3)
    self.assertEqual(found.shape, (len(valid), 1, 3, memory_length + 3))
    for (b, _, i, j), seen in np.ndenumerate(np.asarray(found)):
      before = memory_length + i - j  # How far the key is before the query.
      self.assertEqual(seen, 0 <= before <= valid[b] + i)

  def test_memory_keeps_the_newest_inputs_of_layers(self):
    model, tokens = create(num_layers=1), tokens_of(2, 3)
    memory = random_memory(model, [4, 2], length=5)
    _, found = run(model, random_params(model), tokens, tokens, memory)
    np.testing.assert_array_equal(found.values[:, :, :2],
                                  memory.values[:, :, 3:])
    np.testing.assert_array_equal(found.valid, [5, 5])
    table = random_params(model)['vocabulary']['head']['embedding']
    np.testing.assert_allclose(found.values[0, :, 2:], table[tokens] * 8**.5,
                               rtol=1e-6)

  def test_reset_empties_some_streams(self):
    model, tokens = create(num_layers=1), tokens_of(2, 4)
    params, memory = random_params(model), random_memory(model, [4, 3])
    kept, _ = run(model, params, tokens, tokens, memory)
    fresh, _ = run(model, params, tokens, tokens, models.init_memory(model, 2))
    self.assertGreater(np.abs(kept - fresh).max(1).min(), .1)
    overflown = memory._replace(values=memory.values.at[:, 0].set(jnp.inf))
    found = models.reset_memory(overflown, jnp.array([True, False]))
    losses, _ = run(model, params, tokens, tokens, found)
    np.testing.assert_array_equal(losses, jnp.stack([fresh[0], kept[1]]))


class TransformerXLTest(parameterized.TestCase):

  def test_losses_are_those_of_the_published_formulas(self):
    model, tokens, targets = create(), tokens_of(1, 5), tokens_of(1, 5, seed=7)
    params = random_params(model)
    for valid in 0, 3:
      memory = random_memory(model, [valid])
      found, _ = run(model, params, tokens, targets, memory)
      self.assertEqual(found.dtype, jnp.float32)
      np.testing.assert_allclose(
          found[0], losses_by_hand(model, params, tokens, targets, memory),
          rtol=1e-4, atol=1e-5)

  def test_no_loss_depends_on_later_tokens(self):
    model = create(memory_length=1, num_layers=1)
    params, tokens = random_params(model), tokens_of(1, 6)

    def losses(noise):
      def perturb(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if isinstance(context.module, adaptive.AdaptiveEmbedding) and (
            context.method_name == '__call__'):
          return out + noise
        return out

      with nn.intercept_methods(perturb):
        return model.apply({'params': params}, tokens, tokens,
                           models.init_memory(model, 1), train=False)[0][0]

    slopes = jax.jit(jax.jacrev(losses))(jnp.zeros((1, 6, 8)))
    reached = np.asarray(jnp.abs(slopes).max((1, 3)) > 0)
    np.testing.assert_array_equal(reached, np.tri(6, dtype=bool))

  def test_segments_with_memory_are_one_long_segment(self):
    model, length = create(), 8
    params, tokens, targets = random_params(model), tokens_of(2, 12), (
        tokens_of(2, 12, seed=5))
    memory = models.init_memory(model, 2, length)
    whole, _ = run(model, params, tokens, targets, memory)
    parts = []
    for i in range(0, 12, 4):
      losses, memory = run(model, params, tokens[:, i:i + 4],
                           targets[:, i:i + 4], memory)
      parts.append(losses)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=2e-5,
                               atol=2e-6)
    np.testing.assert_array_equal(memory.valid, [length, length])

  def test_places_that_are_not_filled_do_not_count(self):
    model, tokens = create(num_layers=1), tokens_of(2, 4)
    params, memory = random_params(model), random_memory(model, [0, 2])
    values = memory.values.at[:, 0].set(1e3).at[:, 1, :2].set(-1e3)
    losses = [run(model, params, tokens, tokens, m)[0] for m in (
        memory, memory._replace(values=values))]
    np.testing.assert_array_equal(*losses)
    without, _ = run(model, params, tokens, tokens,
                     models.init_memory(model, 2, 0))
    np.testing.assert_allclose(losses[0][0], without[0], rtol=1e-6)
    self.assertGreater(np.abs(losses[0][1] - without[1]).max(), .1)

  def test_gradients_flow_neither_into_nor_out_of_memory(self):
    model, tokens = create(num_layers=1), tokens_of(2, 3)
    params, memory = random_params(model), random_memory(model, [4, 4])

    def loss(params, values):
      losses, after = model.apply({'params': params}, tokens, tokens,
                                  memory._replace(values=values), train=False)
      return losses.sum(), after.values.sum()

    into, out = jax.jit(lambda *args: (
        jax.grad(lambda *a: loss(*a)[0], 1)(*args),
        jax.grad(lambda *a: loss(*a)[1])(*args)))(params, memory.values)
    for leaf in jax.tree.leaves((into, out)):
      self.assertEqual(float(jnp.abs(leaf).max()), 0)

  def test_logits_are_the_probabilities_behind_the_losses(self):
    model = create(cutoffs=(3, 6), num_layers=1)
    tokens, targets = tokens_of(2, 5), tokens_of(2, 5, seed=9)
    params, memory = random_params(model), random_memory(model, [4, 1])
    found, after = jax.jit(lambda params: model.apply(
        {'params': params}, tokens, memory, method=model.logits))(params)
    losses, expected = run(model, params, tokens, targets, memory)
    self.assertEqual((found.shape, found.dtype), ((2, 5, _VOCAB), jnp.float32))
    np.testing.assert_allclose(np.exp(found).sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(
        -np.take_along_axis(np.asarray(found), np.asarray(targets)[..., None],
                            axis=-1)[..., 0], losses, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(after.values, expected.values)

  def test_dropout_is_for_training_alone(self):
    model, tokens = create(dropout=.5, num_layers=1), tokens_of(2, 4)
    params, memory = random_params(model), random_memory(model, [4, 4])
    losses = lambda model, **how: np.asarray(
        run(model, params, tokens, tokens, memory, **how)[0])
    np.testing.assert_array_equal(losses(model), losses(create(num_layers=1)))
    trained = losses(model, train=True)
    np.testing.assert_array_equal(trained, losses(model, train=True))
    self.assertGreater(np.abs(trained - losses(model)).max(), .01)
    self.assertGreater(
        np.abs(trained - losses(model, train=True, key=1)).max(), .01)

  def test_bfloat16_is_the_type_of_layers_alone(self):
    plain, tokens = create(num_layers=1), tokens_of(2, 4)
    model = plain.clone(dtype=jnp.bfloat16)
    memory = models.init_memory(model, 2)
    init = functools.partial(model.init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), tokens, tokens, memory)
    self.assertEqual({leaf.dtype for leaf in jax.tree.leaves(params)},
                     {jnp.dtype(jnp.float32)})
    params = random_params(model)
    losses, after = run(model, params, tokens, tokens, memory)
    self.assertEqual((losses.dtype, after.values.dtype, after.valid.dtype),
                     (jnp.float32, jnp.float32, jnp.int32))
    np.testing.assert_allclose(
        losses, run(plain, params, tokens, tokens, memory)[0], atol=.2)
    products = sparse_jax.jaxprs.find_products(
        lambda params: model.apply({'params': params}, tokens, tokens, memory,
                                   train=False), params)
    for product in products:
      self.assertEqual((product.lhs.dtype, product.rhs.dtype),
                       (jnp.bfloat16, jnp.bfloat16), product.path)

  def test_one_compilation_serves_all_segments(self):
    tokens, key = tokens_of(2, 3), key_of(0)
    model = create(num_layers=1, dropout=.2)
    params, memory = random_params(model), models.init_memory(model, 2)

    @jax.jit
    def step(params, memory, where):
      memory = models.reset_memory(memory, where)
      return model.apply({'params': params}, tokens, tokens, memory, train=True,
                         rngs={'dropout': key})[1]

    for where in (True, True), (False, False), (True, False):
      memory = step(params, memory, jnp.array(where))
    self.assertEqual(step._cache_size(), 1)

  @parameterized.parameters(
      (dict(num_heads=3), (2, 4), (2, 4), (2, 2, 4, 8), '`d_model` .=8.'),
      ({}, (2, 4), (2, 3), (2, 2, 4, 8), '`targets` .of shape'),
      ({}, (2, 4), (2, 4), (3, 2, 4, 8), '`memory` .values of shape'),
      ({}, (2, 4), (2, 4), (2, 1, 4, 8), '`memory` .values of shape'),
      ({}, (2, 4), (2, 4), (2, 2, 4, 9), '`memory` .values of shape'))
  def test_what_does_not_fit_is_named(self, changes, tokens, targets, values,
                                      message):
    memory = models.Memory(jnp.zeros(values), jnp.zeros(values[1], jnp.int32))
    with self.assertRaisesRegex(ValueError, message):
      create(**changes).init(
          jax.random.key(0), jnp.zeros(tokens, jnp.int32),
          jnp.zeros(targets, jnp.int32), memory, train=False)


class SparseTest(parameterized.TestCase):

  def test_all_weights_of_products_may_be_sparse_and_no_biases(self):
    model = create(cutoffs=(3, 6), d_embed=4)
    leaves = trees.leaves_by_path(random_params(model))
    chosen = {path for path, leaf in leaves.items()
              if sparse_jax.masks.is_kernel(path, leaf)
              or path.endswith('/embedding')}  # As the binary says.
    self.assertEqual(chosen, {path for path in leaves if path.endswith(
        ('/kernel', '/embedding'))})
    self.assertEqual(kernel_count.of_language(
        model, models.init_memory(model, 1, 0)),
                     sum(leaves[path].size for path in chosen))

  def test_each_kernel_of_a_layer_serves_one_product(self):
    model, tokens = create(), tokens_of(2, 3)
    memory, params = models.init_memory(model, 2), random_params(model)
    products = sparse_jax.jaxprs.find_products(
        lambda params: model.apply({'params': params}, tokens, tokens, memory,
                                   train=False), params)
    found = sorted(product.path for product in products if product.path)
    self.assertEqual(found, sorted(
        path for path, leaf in trees.leaves_by_path(params).items()
        if leaf.ndim > 1))

  def test_swat_reaches_every_projection_and_dense_layer(self):
    model, tokens = create(num_layers=1), tokens_of(2, 6)
    params, memory = random_params(model), random_memory(model, [4, 2])
    method = sparse_jax.swat(.5, activation_sparsity=.5,
                             is_sparse=[('vocabulary', False)])
    state = method.init(params)

    def loss(weights, noise):
      """The loss, with noise added to what each Dense gives; its inputs."""
      inputs = {}

      def watch(call, args, kwargs, context):
        if not isinstance(context.module, nn.Dense):
          return call(*args, **kwargs)
        path = '/'.join((*context.module.path, 'kernel'))
        inputs[path] = args[0]
        out = call(*args, **kwargs)
        return out + noise[path] if path in noise else out

      with nn.intercept_methods(watch):
        losses, _ = model.apply({'params': weights}, tokens, tokens, memory,
                                train=False)
      return losses.sum(), inputs

    _, inputs = jax.eval_shape(loss, params, {})
    self.assertLen(inputs, 7)
    leaves = trees.leaves_by_path(params)
    noise = {path: jnp.zeros((*x.shape[:-1], leaves[path].shape[1]))
             for path, x in inputs.items()}

    @jax.jit
    def slopes(params, noise):
      def run(params, noise):
        fn = sparse_jax.operators.with_operators(loss, method, state,
                                                 pack=False)
        return fn(method.read(params, state), noise)

      return jax.grad(run, (0, 1), has_aux=True)(params, noise)

    (grads, errors), inputs = slopes(params, noise)
    for path, x in inputs.items():
      outer = lambda x: np.tensordot(x, errors[path], (range(x.ndim - 1),) * 2)
      expected, dense = outer(largest_half(x)), outer(np.asarray(x))
      found = trees.leaves_by_path(grads)[path]
      np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5,
                                 err_msg=path)
      self.assertGreater(np.abs(found - dense).max(), 1e-3, path)


def largest_half(x):
  """Half of the entries, the largest; by sorting."""
  x = np.asarray(x)
  order = np.argsort(-np.abs(x).ravel(), kind='stable')[:x.size // 2]
  kept = np.zeros(x.size, x.dtype)
  kept[order] = x.ravel()[order]
  return kept.reshape(x.shape)


def parameter_count(model):
  """Entries of all leaves, from shapes alone."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  memory = jax.eval_shape(lambda: models.init_memory(model, 1, 0))
  shapes = jax.eval_shape(functools.partial(model.init, train=False),
                          jax.random.key(0), tokens, tokens, memory)
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


class CreateTest(parameterized.TestCase):

  @parameterized.parameters(
      # What is published, in millions, with tied parameters counted once, and
      # the error in percent. The large enwik8 network has 277.3 million with
      # embeddings as long as it is wide, and 278.2 with those of table 4.
      ('enwik8_small', 256, 69, 1.), ('enwik8_large', 256, 277, .5),
      ('wikitext103', 267735, 285, .1))
  def test_presets_are_as_large_as_published(self, name, vocab_size, millions,
                                             percent):
    count = parameter_count(models.create(name, vocab_size=vocab_size))
    self.assertLess(abs(count / millions / 1e4 - 100), percent)

  @parameterized.parameters(
      (('enwik8_small', 256), 69_460_224, 24 * (5 * 512**2 + 2 * 512 * 1536)
       + 256 * 512),
      (('enwik8_large', 256), 278_249_728, 24 * (5 * 1024**2 + 2 * 1024 * 3072)
       + 256 * 512 + 2 * 512 * 1024),
      (('wikitext103', 267735), 285_205_322,
       18 * (5 * 1024**2 + 2 * 1024 * 4096) + 20003 * 1024 + 20000 * 256
       + 160000 * 64 + 67735 * 16 + 1024 * (2 * 1024 + 256 + 64 + 16)))
  def test_counts_are_those_of_the_shapes(self, named, parameters, kernels):
    model = models.create(named[0], vocab_size=named[1])
    self.assertEqual(parameter_count(model), parameters)
    self.assertEqual(kernel_count.of_language(
        model, models.init_memory(model, 1, 0)), kernels)

  def test_width_scales_to_even_multiples_of_the_heads(self):
    model = models.create('small', vocab_size=256, width=.3)
    self.assertEqual((model.d_model, model.d_ff, model.d_embed), (80, 304, 80))
    least = models.create('tiny', vocab_size=256, width=1e-6)
    self.assertEqual((least.d_model, least.d_ff, least.d_embed), (8, 8, 8))

  def test_arguments_replace_those_of_the_preset(self):
    model = models.create('tiny', vocab_size=90, dropout=.1, dtype=jnp.bfloat16)
    self.assertEqual(
        (model.vocab_size, model.dropout, model.dtype),
        (90, .1, jnp.bfloat16))
    self.assertEqual(models.init_memory(model, 2).values.shape, (2, 2, 64, 128))
    default = models.create('wikitext103', vocab_size=40001)
    self.assertEqual((default.cutoffs, default.memory_length),
                     ((20000, 40000), 768))

  @parameterized.parameters(
      (lambda: models.create('tiny', vocab_size=9, dropout=1.), '`dropout` '),
      (lambda: models.create('tiny', vocab_size=9, dropout=float('nan')),
       '`dropout` .=nan.'),
      (lambda: models.create('tiny', vocab_size=9, width=0.), '`width` .=0.0.'),
      (lambda: models.create('tiny', vocab_size=9, width=float('inf')),
       '`width` .=inf.'))
  def test_a_bad_argument_is_named_with_its_value(self, call, message):
    with self.assertRaisesRegex(ValueError, message):
      call()


if __name__ == '__main__':
  absltest.main()
