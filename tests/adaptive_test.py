"""Tests of experiments/language/adaptive.py."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from experiments.language import adaptive

_VOCAB, _D_MODEL = 23, 12
# Name, length of the head's vectors, cutoffs, div_val.
_CASES = (
    ('plain', 12, (), 4),
    ('plain_projected', 8, (), 4),
    ('one_tail', 12, (5,), 2),
    ('three_tails', 8, (3, 4, 17), 2),
    ('vectors_of_length_one', 8, (2, 11), 16),
    ('equal_lengths', 12, (7, 15), 1))


def create(d_embed, cutoffs, div_val, **kwargs):
  return adaptive.AdaptiveEmbedding(
      _VOCAB, _D_MODEL, d_embed, cutoffs, div_val, **kwargs)


def random_params(model, seed=0):
  """Parameters, biases too, that are far from small."""
  init = lambda key: model.init(
      key, jnp.zeros((1, _D_MODEL)), jnp.zeros((1,), jnp.int32),
      method=model.losses)
  shapes = jax.eval_shape(init, jax.random.key(0))['params']
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)


def run(model, params, *args, method=None):
  apply = lambda params: model.apply({'params': params}, *args, method=method)
  return jax.jit(apply)(params)


def hidden_states(*shape, seed=1):
  return jnp.asarray(
      np.random.default_rng(seed).normal(size=(*shape, _D_MODEL)), jnp.float32)


def clusters(params, cutoffs):
  """(first token, parameters) of each cluster."""
  names = ['head', *(f'tail_{i}' for i in range(1, len(cutoffs) + 1))]
  assert set(params) == set(names), sorted(params)
  return [(first, jax.tree.map(np.float64, params[name]))
          for first, name in zip((0, *cutoffs), names)]


def softmax(logits):
  exps = np.exp(logits - logits.max(-1, keepdims=True))
  return exps / exps.sum(-1, keepdims=True)


def probabilities_by_hand(params, cutoffs, hidden):
  """One full softmax, from its matrices: float64[n, vocab_size]."""
  hidden = np.float64(hidden)

  def cluster_softmax(p, into):
    return softmax(hidden @ into @ p['embedding'].T + p['bias'])

  (_, head), *tails = clusters(params, cutoffs)
  into = head['out']['kernel'] if 'out' in head else np.eye(_D_MODEL)
  classes = cluster_softmax(head, into)
  tokens = classes.shape[-1] - len(cutoffs)
  parts = [classes[:, :tokens]]
  for i, (_, tail) in enumerate(tails):
    inside = cluster_softmax(tail, tail['kernel'].T)
    parts.append(classes[:, tokens + i:tokens + i + 1] * inside)
  return np.concatenate(parts, axis=-1)


class AdaptiveEmbeddingTest(parameterized.TestCase):

  @parameterized.named_parameters(*_CASES)
  def test_probabilities_are_those_of_the_matrices(self, d_embed, cutoffs,
                                                   div_val):
    model = create(d_embed, cutoffs, div_val)
    params, hidden = random_params(model), hidden_states(4)
    found = run(model, params, hidden, method=model.log_probabilities)
    expected = probabilities_by_hand(params, cutoffs, hidden)
    self.assertEqual((found.shape, found.dtype), ((4, _VOCAB), jnp.float32))
    np.testing.assert_allclose(expected.sum(-1), 1, rtol=1e-12)
    np.testing.assert_allclose(np.exp(found).sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(found, np.log(expected), rtol=1e-5, atol=1e-5)

  @parameterized.named_parameters(*_CASES)
  def test_loss_of_each_token_is_minus_its_log_probability(self, d_embed,
                                                           cutoffs, div_val):
    model = create(d_embed, cutoffs, div_val)
    params = random_params(model)
    hidden = jnp.broadcast_to(hidden_states(1, 1), (1, _VOCAB, _D_MODEL))
    targets = jnp.arange(_VOCAB)[None]

    def losses(params, hidden):
      return model.apply({'params': params}, hidden, targets,
                         method=model.losses)

    def by_all(params, hidden):
      found = model.apply({'params': params}, hidden,
                          method=model.log_probabilities)
      return -jnp.take_along_axis(found, targets[..., None], axis=-1)[..., 0]

    # Each loss has a weight of its own, so that no error can cancel.
    weights = 1 + jnp.arange(_VOCAB, dtype=jnp.float32)[None]

    def value_and_grads(fn):
      value, pull = jax.vjp(fn, params, hidden)
      return value, pull(weights)

    found, expected = jax.jit(
        lambda: (value_and_grads(losses), value_and_grads(by_all)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(
        a, b, rtol=1e-4, atol=1e-3), found, expected)

  @parameterized.named_parameters(*_CASES)
  def test_embeds_each_token_by_its_row_and_projection(self, d_embed, cutoffs,
                                                       div_val):
    model = create(d_embed, cutoffs, div_val)
    params = random_params(model)
    found = run(model, params, jnp.arange(_VOCAB)[None])[0]
    for token in range(_VOCAB):
      first, cluster = max((c for c in clusters(params, cutoffs)
                            if c[0] <= token), key=lambda c: c[0])
      row = cluster['embedding'][token - first]
      expected = row @ cluster.get('kernel', np.eye(_D_MODEL))
      np.testing.assert_allclose(found[token], expected * _D_MODEL ** .5,
                                 rtol=1e-5, atol=1e-5)

  def test_everything_is_tied_but_the_projection_of_the_head(self):
    def shapes(*case):
      params = random_params(create(*case))
      return jax.tree.map(lambda leaf: leaf.shape, params)

    self.assertEqual(shapes(12, (), 4),
                     {'head': {'embedding': (23, 12), 'bias': (23,)}})
    self.assertEqual(shapes(8, (), 4), {'head': {
        'embedding': (23, 8), 'bias': (23,), 'kernel': (8, 12),
        'out': {'kernel': (12, 8)}}})
    self.assertEqual(shapes(12, (5, 9), 2), {
        'head': {'embedding': (7, 12), 'bias': (7,), 'kernel': (12, 12),
                 'out': {'kernel': (12, 12)}},
        'tail_1': {'embedding': (4, 6), 'bias': (4,), 'kernel': (6, 12)},
        'tail_2': {'embedding': (14, 3), 'bias': (14,), 'kernel': (3, 12)}})

  def test_no_logits_are_kept_for_the_gradient(self):
    model = create(12, (7,), 2)
    params, hidden = random_params(model), hidden_states(40)
    losses = lambda params, hidden: model.apply(
        {'params': params}, hidden, jnp.arange(40) % _VOCAB,
        method=model.losses)
    kept = jax.eval_shape(lambda *args: jax.vjp(losses, *args)[1], params,
                          hidden)
    shapes = {leaf.shape for leaf in jax.tree.leaves(kept)}
    self.assertIn((40, 6), shapes)  # The narrow states of the tail.
    self.assertNoCommonElements(shapes, {(40, 8), (40, 16)})

  def test_bfloat16_computes_in_it_and_sums_logits_in_float32(self):
    model = create(8, (5,), 2, dtype=jnp.bfloat16)
    params = jax.tree.map(lambda leaf: leaf / 3, random_params(model))
    self.assertEqual({leaf.dtype for leaf in jax.tree.leaves(params)},
                     {jnp.dtype(jnp.float32)})
    tokens = jnp.arange(_VOCAB)
    x = run(model, params, tokens)
    self.assertEqual(x.dtype, jnp.bfloat16)
    losses = run(model, params, x, tokens, method=model.losses)
    exact = run(create(8, (5,), 2), params, x.astype(jnp.float32), tokens,
                method='losses')
    self.assertEqual(losses.dtype, jnp.float32)
    np.testing.assert_allclose(losses, exact, atol=.05)
    self.assertFalse(np.array_equal(losses, exact))

  @parameterized.parameters(
      ((5, 5),), ((0, 4),), ((9, 4),), ((4, _VOCAB),), ((4, 99),), ((-3,),))
  def test_cutoffs_out_of_order_are_named(self, cutoffs):
    model = create(8, cutoffs, 2)
    with self.assertRaisesRegex(ValueError, r'`cutoffs` \(=.* must rise'):
      jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1,), jnp.int32))


if __name__ == '__main__':
  absltest.main()
