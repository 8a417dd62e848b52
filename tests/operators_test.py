"""Tests of sparse operands against hand-written forward and backward passes."""

import functools
import itertools

from absl.testing import absltest
from absl.testing import parameterized
from flax import linen as nn
from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

import sparse_jax
from sparse_jax.operators.operands import Operands
from sparse_jax.operators.sparse_products import first_thresholds
from sparse_jax.operators.sparse_products import sparse_conv_general_dilated
from sparse_jax.operators.sparse_products import sparse_dot_general
from sparse_jax.operators.sparse_products import sparse_einsum

MATMUL = (((1,), (0,)), ((), ()))
SWAT = Operands(.6, 0, .6, .7, 0)
# Every combination that SWAT's authors speak of, and five different values.
COMBINATIONS = {
    'dense': Operands(),
    'figure_1_weights': Operands(forward_weight=.6),
    'figure_1_activations': Operands(forward_activation=.6),
    'figure_2_weights_and_activations': Operands(
        backward_weight=.6, backward_activation=.6),
    'figure_2_gradient': Operands(output_gradient=.6),
    'gradient_and_activations': Operands(
        backward_activation=.6, output_gradient=.6),
    'gradient_and_weights': Operands(backward_weight=.6, output_gradient=.6),
    'gradient_weights_activations': Operands(
        backward_weight=.6, backward_activation=.6, output_gradient=.6),
    'swat': SWAT,
    'both_passes': Operands(.5, .6, .5, .6, .7),
    'all_different': Operands(.5, .6, .7, .8, .3),
}


def normal(*shape, seed=0, dtype=np.float32):
  return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def top(x, sparsity):
  """x with all but its largest magnitudes 0, the earlier first on ties."""
  k = max(1, round((1 - sparsity) * x.size)) if sparsity else x.size
  kept = np.zeros(x.size, bool)
  kept[np.argsort(-np.abs(x).ravel(), kind='stable')[:k]] = True
  return np.where(kept.reshape(x.shape), x, 0)


def by_hand(forward, backward, operands, x, w, dy):
  """y, dX and dW as the paper's three equations say them."""
  s = operands
  y = forward(top(x, s.forward_activation), top(w, s.forward_weight))
  g = top(dy, s.output_gradient)
  dx = backward(None, top(w, s.backward_weight), g)[0]
  dw = backward(top(x, s.backward_activation), None, g)[1]
  return y, dx, dw


# Compiles in half the time.
quick_jit = functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def passes(product, x, w, dy):
  """y, dX and dW of a product."""
  y, pull = jax.vjp(product, *jax.tree.map(jnp.asarray, (x, w)))
  return y, *pull(jnp.asarray(dy, y.dtype))


def vjp(product, x, w, dy):
  """The same, compiled."""
  return quick_jit(functools.partial(passes, product))(x, w, dy)


def assert_close(got, want, rtol=2e-5):
  """Sums of a few dozen float32 terms, in another order."""
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol, rtol)


def matmul(x, w):
  return x @ w


def matmul_backward(x, w, g):
  return (None if w is None else g @ w.T), (None if x is None else x.T @ g)


class DotGeneralTest(parameterized.TestCase):

  @parameterized.named_parameters(*COMBINATIONS.items())
  def test_each_combination_is_its_three_equations(self, operands):
    """SW-b, and figures 1 and 2."""
    x, w, dy = normal(6, 8), normal(8, 5, seed=1), normal(6, 5, seed=2)
    dot = sparse_dot_general(operands)
    got = vjp(lambda x, w: dot(x, w, MATMUL), x, w, dy)
    assert_close(got, by_hand(matmul, matmul_backward, operands, x, w, dy))

  def test_forward_depends_on_no_backward_setting(self):
    """SW-a, bit for bit."""
    x, w = normal(6, 8), normal(8, 5, seed=1)
    dot = sparse_dot_general(Operands(.5, .25))
    want = quick_jit(lambda x, w: dot(x, w, MATMUL))(x, w)
    for backward in ((.5, 0, 0), (0, .25, .75), (.75, .75, .75)):
      dot = sparse_dot_general(Operands(.5, .25, *backward))
      got = vjp(lambda x, w: dot(x, w, MATMUL), x, w, normal(6, 5, seed=2))
      np.testing.assert_array_equal(got[0], want)

  def test_weights_and_activations_outside_get_a_gradient(self):
    x, w, dy = normal(6, 8), normal(8, 5, seed=1), normal(6, 5, seed=2)
    dot = sparse_dot_general(Operands(.5, .5, .5, 0, 0))
    _, dx, dw = vjp(lambda x, w: dot(x, w, MATMUL), x, w, dy)
    self.assertTrue(np.all(dw[top(w, .5) == 0] != 0))
    self.assertTrue(np.any(dx[top(x, .5) == 0] != 0))

  def test_a_relu_with_more_zeros_than_asked_for_is_untouched(self):
    """SW-c."""
    x = np.where(np.arange(48).reshape(6, 8) % 4 == 0, normal(6, 8), 0)
    w, dy = normal(8, 5, seed=1), normal(6, 5, seed=2)
    got = vjp(lambda x, w: sparse_dot_general(Operands(
        backward_activation=.7))(x, w, MATMUL), x, w, dy)
    assert_close(got[2:], [x.T @ dy])

  def test_batch_and_several_axes(self):
    """Of each the whole tensor competes."""
    x, w = normal(3, 4, 2, 5), normal(3, 5, 2, 6, seed=1)
    numbers = (((2, 3), (2, 1)), ((0,), (0,)))
    dot = sparse_dot_general(Operands(.5, .6, .7, .8, .3))
    got = vjp(lambda x, w: dot(x, w, numbers), x, w, normal(3, 4, 6, seed=2))
    want = by_hand(
        lambda x, w: np.einsum('bnij,bjio->bno', x, w),
        lambda x, w, g: (
            None if w is None else np.einsum('bno,bjio->bnij', g, w),
            None if x is None else np.einsum('bnij,bno->bjio', x, g)),
        Operands(.5, .6, .7, .8, .3), x, w, normal(3, 4, 6, seed=2))
    assert_close(got, want)

  def test_the_weight_may_be_the_left_operand(self):
    x, w, dy = normal(6, 8), normal(8, 5, seed=1), normal(6, 5, seed=2)
    dot = sparse_dot_general(Operands(.5, .6, .7, .8, .3), weight='left')
    got = vjp(lambda x, w: dot(w, x, (((0,), (1,)), ((), ()))).T, x, w, dy)
    want = by_hand(matmul, matmul_backward, Operands(.5, .6, .7, .8, .3),
                   x, w, dy)
    # Ties apart, dy and its transpose have the same largest entries.
    assert_close(got, want)

  def test_neither_jit_nor_packing_changes_a_value(self):
    x, w, dy = normal(6, 8), normal(8, 5, seed=1), normal(6, 5, seed=2)
    dot = sparse_dot_general(SWAT, pack=False)
    got = passes(lambda x, w: dot(x, w, MATMUL), x, w, dy)
    assert_close(got, by_hand(matmul, matmul_backward, SWAT, x, w, dy))

  def test_a_traced_sparsity_equals_a_static_one(self):
    x, w, dy = normal(6, 8), normal(8, 5, seed=1), normal(6, 5, seed=2)
    want = COMBINATIONS['all_different']

    @quick_jit
    def run(operands):
      dot = sparse_dot_general(operands)
      return passes(lambda x, w: dot(x, w, MATMUL), x, w, dy)

    assert_close(run(Operands(*map(jnp.float32, want))),
                 by_hand(matmul, matmul_backward, want, x, w, dy))

  def test_bfloat16_stays_and_keeps_exact_counts(self):
    """Of 16-bit values many are equal; the earlier are kept."""
    x = jnp.asarray(normal(12, 8), jnp.bfloat16)
    w = jnp.asarray(normal(8, 5, seed=1), jnp.bfloat16)
    dy = jnp.asarray(normal(12, 5, seed=2), jnp.bfloat16)
    dot = sparse_dot_general(SWAT)
    got = vjp(lambda x, w: dot(x, w, MATMUL), x, w, dy)
    for array in got:
      self.assertEqual(array.dtype, jnp.bfloat16)
    x, w, dy = (np.asarray(a, np.float32) for a in (x, w, dy))
    # Rounding of the result to eight bits.
    assert_close(got, by_hand(matmul, matmul_backward, SWAT, x, w, dy), 2e-2)

  def test_a_wider_output_has_gradients_of_the_operands_types(self):
    x = jnp.asarray(normal(6, 8), jnp.bfloat16)
    w = jnp.asarray(normal(8, 5, seed=1), jnp.bfloat16)
    dot = sparse_dot_general(SWAT)
    y, dx, dw = vjp(lambda x, w: dot(
        x, w, MATMUL, preferred_element_type=jnp.float32), x, w,
                    normal(6, 5, seed=2))
    self.assertEqual([y.dtype, dx.dtype, dw.dtype],
                     [jnp.float32, jnp.bfloat16, jnp.bfloat16])


class ScopeTest(parameterized.TestCase):

  @parameterized.parameters(('example', 6), (3, 3), (1, 1), ('tensor', 1))
  def test_each_part_of_the_batch_has_its_own_top_k(self, scope, parts):
    """meProp is the scope 'example' of the output gradient."""
    x, w, dy = normal(6, 8), normal(8, 5, seed=1), normal(6, 5, seed=2)
    dot = sparse_dot_general(
        Operands(forward_activation=.5, backward_activation=.75,
                 output_gradient=.6), activation_scope=scope,
        gradient_scope=scope)
    got = vjp(lambda x, w: dot(x, w, MATMUL), x, w, dy)

    def each(array, sparsity):
      return np.concatenate([top(part, sparsity)
                             for part in np.split(array, parts)])

    g = each(dy, .6)
    assert_close(got, (each(x, .5) @ w, g @ w.T, each(x, .75).T @ g))

  def test_meprop_of_one_example(self):
    """The specification's numbers, k = 2 of 6."""
    dy = jnp.array([[.1, -.9, .2, .05, -.6, .4]])
    dot = sparse_dot_general(Operands(output_gradient=2 / 3),
                             gradient_scope='example')
    _, dx, dw = vjp(lambda x, w: dot(x, w, MATMUL), jnp.ones((1, 1)),
                    jnp.ones((1, 6)), dy)
    np.testing.assert_allclose(dw, [[0, -.9, 0, 0, -.6, 0]])
    np.testing.assert_allclose(dx, [[-1.5]])

  def test_unified_meprop_keeps_whole_features(self):
    x, w, dy = normal(6, 8), normal(8, 10, seed=1), normal(6, 10, seed=2)
    dot = sparse_dot_general(Operands(output_gradient=.7),
                             gradient_scope='unified')
    _, dx, dw = vjp(lambda x, w: dot(x, w, MATMUL), x, w, dy)
    g = np.where(top(np.abs(dy).sum(0), .7) > 0, dy, 0)
    assert_close((dx, dw), (g @ w.T, x.T @ g))
    self.assertEqual(np.any(dw != 0, axis=0).sum(), 3)

  def test_unified_features_of_a_convolution_are_its_filters(self):
    x, w, dy = normal(2, 3, 7), normal(5, 3, 2, seed=1), normal(2, 5, 6, seed=2)
    conv = sparse_conv_general_dilated(Operands(output_gradient=.6),
                                       gradient_scope='unified')
    numbers = ('NCW', 'OIW', 'NCW')
    _, _, dw = vjp(lambda x, w: conv(x, w, (1,), 'VALID',
                                     dimension_numbers=numbers), x, w, dy)
    kept = top(np.abs(dy).sum((0, 2)), .6) > 0
    np.testing.assert_array_equal(np.any(dw != 0, axis=(1, 2)), kept)


def naive_conv(x, w, dy, strides, pads, x_dilation, w_dilation, groups):
  """y, dX, dW of NHWC, HWIO by loops over output and kernel positions."""
  y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
  inner, outer = x.shape[-1] // groups, w.shape[-1] // groups
  spots = [range(n) for n in dy.shape[1:3] + w.shape[:2] + (groups,)]
  for i, j, a, b, group in itertools.product(*spots):
    place = [o * s + k * d - p for o, s, k, d, p in zip(
        (i, j), strides, (a, b), w_dilation, pads)]
    if any(p % d or not 0 <= p // d < n
           for p, d, n in zip(place, x_dilation, x.shape[1:3])):
      continue
    at = np.s_[:, place[0] // x_dilation[0], place[1] // x_dilation[1],
               group * inner:(group + 1) * inner]
    to = np.s_[:, i, j, group * outer:(group + 1) * outer]
    tap = np.s_[a, b, :, group * outer:(group + 1) * outer]
    y[to] += x[at] @ w[tap]
    dx[at] += dy[to] @ w[tap].T
    dw[tap] += x[at].T @ dy[to]
  return y, dx, dw


CONVOLUTIONS = {
    'plain': ((1, 1), (0, 0), (1, 1), (1, 1), 1),
    'strides_and_padding': ((2, 1), (1, 2), (1, 1), (1, 1), 1),
    'dilated_kernel': ((1, 1), (1, 1), (1, 1), (2, 1), 1),
    'transposed': ((1, 1), (1, 1), (2, 2), (1, 1), 1),
    'groups': ((1, 1), (1, 1), (1, 1), (1, 1), 2),
    'depthwise': ((2, 2), (1, 1), (1, 1), (1, 2), 4),
}


class ConvTest(parameterized.TestCase):

  def conv(self, operands, strides, pads, x_dilation, w_dilation, groups,
           **options):
    conv = sparse_conv_general_dilated(operands, **options)
    return lambda x, w: conv(
        x, w, strides, [(p, p) for p in pads], lhs_dilation=x_dilation,
        rhs_dilation=w_dilation, dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups)

  @parameterized.named_parameters(
      *((name, *geometry) for name, geometry in CONVOLUTIONS.items()))
  def test_each_kind_is_its_three_equations(self, *geometry):
    operands = Operands(.5, .6, .7, .8, .3)
    x = normal(2, 4, 3, 4)
    w = normal(3, 2, 4 // geometry[-1], 4, seed=1)
    conv = self.conv(operands, *geometry)
    dy = normal(*jax.eval_shape(conv, x, w).shape, seed=2)
    got = vjp(conv, x, w, dy)
    s = operands
    run = lambda x, w, dy: naive_conv(x, w, dy, *geometry)
    g = top(dy, s.output_gradient)
    want = (run(top(x, s.forward_activation), top(w, s.forward_weight), dy)[0],
            run(x, top(w, s.backward_weight), g)[1],
            run(top(x, s.backward_activation), w, g)[2])
    assert_close(got, want)

  def test_channels_are_kept_whole_in_any_layout(self):
    """SW-d, with the kernel's axes in two orders."""
    x, w = normal(1, 5, 5, 4), normal(3, 3, 4, 6, seed=1)
    options = dict(structure=sparse_jax.Channel())
    sums = np.abs(w).sum((0, 1), keepdims=True)
    kept = np.where(top(sums, .75) > 0, w, 0)
    want = naive_conv(x, kept, np.zeros((1, 3, 3, 6), np.float32),
                      *CONVOLUTIONS['plain'])[0]
    plain = self.conv(Operands(.75), *CONVOLUTIONS['plain'], **options)
    assert_close([plain(x, w)], [want])
    other = sparse_conv_general_dilated(Operands(.75), **options)(
        x.transpose(0, 3, 1, 2), w.transpose(3, 2, 0, 1), (1, 1), 'VALID')
    assert_close([other], [want.transpose(0, 3, 1, 2)])

  def test_channels_of_a_pointwise_convolution_are_its_entries(self):
    """SW-d."""
    x, w = normal(1, 3, 3, 4), normal(1, 1, 4, 6, seed=1)
    outputs = [self.conv(Operands(.75), *CONVOLUTIONS['plain'],
                         structure=structure)(x, w)
               for structure in (sparse_jax.Channel(),
                                 sparse_jax.Unstructured())]
    np.testing.assert_array_equal(*outputs)


class EinsumTest(parameterized.TestCase):

  @parameterized.parameters(
      ('bti,io->bto', (3, 4, 5), (5, 6)),
      ('bti,oi->bot', (3, 4, 5), (6, 5)),
      ('bthk,hkd->btd', (2, 3, 2, 4), (2, 4, 5)),
      ('...i,io->...o', (3, 4, 5), (5, 6)),
      ('bgi,gio->gbo', (3, 2, 5), (2, 5, 4)))
  def test_the_second_operand_is_the_weight(self, subscripts, x, w):
    x, w = normal(*x), normal(*w, seed=1)
    operands = Operands(.5, .6, .7, .8, .3)
    dy = normal(*np.einsum(subscripts, x, w).shape, seed=2)
    einsum = sparse_einsum(operands)
    got = vjp(lambda x, w: einsum(subscripts, x, w), x, w, dy)
    letters = subscripts.replace('...', 'bt').replace('->', ',').split(',')
    to_x, to_w = (f'{letters[2]},{letters[i]}->{letters[j]}'
                  for i, j in ((1, 0), (0, 1)))
    want = by_hand(
        lambda x, w: np.einsum(subscripts, x, w),
        lambda x, w, g: (None if w is None else np.einsum(to_x, g, w),
                         None if x is None else np.einsum(to_w, g, x)),
        operands, x, w, dy)
    assert_close(got, want)

  def test_a_structure_finds_the_rows_of_the_weight(self):
    """The weight lies as (outputs, inputs); 2 x 3 tiles of (in, out)."""
    x, w = normal(3, 4), normal(6, 4, seed=1)
    block = sparse_jax.Block((2, 3))
    got = sparse_einsum(Operands(.5), structure=block)('bi,oi->bo', x, w)
    mask = sparse_jax.make_mask(np.abs(w.T), .5, structure=block)
    assert_close([got], [x @ np.where(mask, w.T, 0)])


class TransformTest(parameterized.TestCase):

  def test_vmap_over_layers_equals_each(self):
    x, w, dy = normal(3, 6, 8), normal(3, 8, 5, seed=1), normal(3, 6, 5, seed=2)
    dot = sparse_dot_general(Operands(.5, .6, .7, .8, .3))
    run = functools.partial(passes, lambda x, w: dot(x, w, MATMUL))
    stacked, one = quick_jit(jax.vmap(run))(x, w, dy), quick_jit(run)
    for i in range(3):
      assert_close((a[i] for a in stacked), one(x[i], w[i], dy[i]))

  def test_batch_axes_of_a_weight_have_a_top_k_each(self):
    w = normal(3, 8, 5, seed=1)
    dot = sparse_dot_general(Operands(.5), batch_axes=(0,))
    x = np.broadcast_to(np.eye(8, dtype=np.float32), (3, 8, 8))
    got = dot(x, w, (((2,), (1,)), ((0,), (0,))))
    np.testing.assert_array_equal(got, [top(layer, .5) for layer in w])

  def test_scan_with_remat_equals_the_unrolled_layers(self):
    weights, x = normal(3, 8, 8), normal(6, 8, seed=1)
    dot = sparse_dot_general(SWAT)
    layer = lambda x, w: sparse_jax.operators.relu(dot(x, w, MATMUL))
    body = jax.checkpoint(layer)

    def scanned(weights, x):
      y, _ = lax.scan(lambda x, w: (body(x, w), None), x, weights)
      return jnp.sum(y ** 2)

    def unrolled(weights, x):
      return jnp.sum(functools.reduce(layer, weights, x) ** 2)

    got = quick_jit(jax.grad(scanned, (0, 1)))(weights, x)
    assert_close(got, quick_jit(jax.grad(unrolled, (0, 1)))(weights, x))

  @parameterized.named_parameters(
      ('packed_in_parts', dict(activation_scope=8)),
      ('whole', dict(pack=False)))
  def test_a_sharded_batch_stays_where_it_is(self, options):
    """Weights and scalars are reduced over devices; nothing is gathered."""
    mesh = jax.make_mesh((8,), ('batch',),
                         axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P('batch'))
    whole = jax.NamedSharding(mesh, jax.P())
    x, w, dy = normal(16, 64), normal(64, 8, seed=1), normal(16, 8, seed=2)
    dot = sparse_dot_general(Operands(backward_activation=.9), **options)
    run = functools.partial(passes, lambda x, w: dot(x, w, MATMUL))
    step = jax.jit(run, in_shardings=(rows, whole, rows),
                   out_shardings=(rows, rows, whole)).lower(x, w, dy).compile()
    text = step.as_text()
    for moved in ('all-gather', 'all-to-all', 'collective-permute'):
      self.assertEqual(text.count(moved), 0, moved)
    assert_close(step(*(jax.device_put(a, s) for a, s in zip(
        (x, w, dy), (rows, whole, rows)))), quick_jit(run)(x, w, dy))

  def explicit_gradients(self, **options):
    """On eight devices with explicit axes, and what they should be."""
    mesh = jax.make_mesh((8,), ('batch',),
                         axis_types=(jax.sharding.AxisType.Explicit,))
    x, w = normal(16, 64), normal(64, 3, seed=1)
    dot = sparse_dot_general(SWAT, **options)
    grads = jax.grad(lambda x, w: jnp.sum(jnp.sin(dot(x, w, MATMUL))), (0, 1))
    with jax.set_mesh(mesh):
      sharded = jax.device_put(x, jax.P('batch'))
      got = quick_jit(grads)(sharded, jax.device_put(w, jax.P()))
    return got, quick_jit(grads)(x, w)

  @parameterized.parameters(
      dict(activation_scope=8), dict(activation_scope='example'),
      dict(activation_scope='example', gradient_scope='unified'),
      dict(pack=False), dict(activation_scope=2, pack=False))
  def test_an_explicit_mesh(self, **options):
    assert_close(*self.explicit_gradients(**options))

  def test_one_pack_of_what_is_split_is_refused(self):
    with self.assertRaisesRegex(ValueError, r"activation_scope.*'tensor'"):
      self.explicit_gradients()


class ThresholdTest(parameterized.TestCase):

  def step(self, x, w, dy, thresholds, due, operands, **options):
    @quick_jit
    def run(x, w, thresholds, due):
      def loss(x, w, thresholds):
        dot = sparse_dot_general(operands, thresholds=thresholds, due=due,
                                 **options)
        y = dot(x, w, MATMUL)
        return jnp.vdot(y, dy), y

      return jax.grad(loss, (0, 1, 2), has_aux=True)(x, w, thresholds)

    (dx, dw, stored), y = run(x, w, thresholds, due)
    return (y, dx, dw), stored

  def test_when_due_it_is_the_exact_top_k_and_hands_on_its_thresholds(self):
    x, w, dy = normal(6, 8), normal(8, 5, seed=1), normal(6, 5, seed=2)
    operands = COMBINATIONS['all_different']
    got, stored = self.step(x, w, dy, first_thresholds(), True, operands)
    assert_close(got, by_hand(matmul, matmul_backward, operands, x, w, dy))
    for name, array in zip(Operands._fields, (w, x, w, x, dy)):
      kept = np.abs(top(array, getattr(operands, name)))
      self.assertEqual(getattr(stored, name), kept[kept > 0].min(), name)

  def test_when_not_due_it_compares_with_what_was_stored(self):
    x, w, dy = normal(6, 8), normal(8, 5, seed=1), normal(6, 5, seed=2)
    given = Operands(*map(jnp.float32, (.5, .4, .6, .7, .3)))
    got, stored = self.step(x, w, dy, given, False,
                            COMBINATIONS['all_different'], pack=False)
    self.assertEqual(stored, given)
    above = lambda a, t: np.where(np.abs(a) >= t, a, 0)
    g = above(dy, given.output_gradient)
    assert_close(got, (
        above(x, given.forward_activation) @ above(w, given.forward_weight),
        g @ above(w, given.backward_weight).T,
        above(x, given.backward_activation).T @ g))

  def test_zeros_take_no_room_in_a_packed_activation(self):
    """A threshold of 0, as of a ReLU's output, lets all but zeros pass."""
    x = np.where(np.arange(48).reshape(6, 8) % 6 == 5, 1., 0.)
    x, dy = x.astype(np.float32), normal(6, 5, seed=2)
    got, stored = self.step(x, normal(8, 5), dy, first_thresholds(), False,
                            Operands(backward_activation=.8))
    assert_close(got[2:], [x.T @ dy])
    self.assertEqual(stored.backward_activation, 0)

  def test_a_packed_activation_has_room_for_a_quarter_more(self):
    """16 are asked for; 20 find room, of 80 that reach the threshold."""
    x, w = np.ones((8, 10), np.float32), np.zeros((10, 1), np.float32)
    given = first_thresholds()._replace(backward_activation=jnp.float32(.5))
    got, _ = self.step(x, w, np.ones((8, 1), np.float32), given, False,
                       Operands(backward_activation=.8))
    self.assertEqual(got[2].sum(), 20)

  def test_thresholds_of_scanned_layers_are_theirs(self):
    weights, x = normal(3, 8, 8), normal(16, 8, seed=1)
    stacked = jax.tree.map(lambda t: jnp.zeros(3), first_thresholds())

    def loss(thresholds, due):
      def layer(x, inputs):
        w, t = inputs
        dot = sparse_dot_general(Operands(backward_activation=.5),
                                 thresholds=t, due=due)
        return jnp.tanh(dot(x, w, MATMUL)), jnp.abs(x)

      y, inputs = lax.scan(layer, x, (weights, thresholds))
      return y.sum(), inputs

    found, inputs = quick_jit(jax.grad(loss, has_aux=True))(stacked, True)
    np.testing.assert_array_equal(found.backward_activation,
                                  np.sort(inputs.reshape(3, -1))[:, 64])
    again, _ = quick_jit(jax.grad(loss, has_aux=True))(found, False)
    np.testing.assert_array_equal(again.backward_activation,
                                  found.backward_activation)


class FlaxTest(parameterized.TestCase):
  """The operators stand in for those of Flax's own layers."""

  def grads(self, model, variables, x):
    loss = lambda v, x: jnp.sum(jnp.sin(model.apply(v, x)))
    return jax.tree.leaves(quick_jit(jax.grad(loss, (0, 1)))(variables, x))

  @parameterized.named_parameters(
      ('dense', lambda dot, conv: nn.Dense(5, dot_general=dot), (4, 8)),
      ('conv', lambda dot, conv: nn.Conv(
          4, (3, 3), strides=2, feature_group_count=2,
          conv_general_dilated=conv), (2, 4, 4, 2)),
      ('attention', lambda dot, conv: nn.MultiHeadDotProductAttention(
          2, qkv_dot_general=dot, out_dot_general=dot), (2, 5, 8)))
  def test_linen_layers_at_sparsity_zero_are_themselves(self, layer, shape):
    x = jnp.asarray(normal(*shape))
    sparse = layer(sparse_dot_general(Operands()),
                   sparse_conv_general_dilated(Operands()))
    variables = jax.tree.map(
        lambda leaf: normal(*leaf.shape),
        jax.eval_shape(sparse.init, jax.random.key(0), x))
    dense = layer(lax.dot_general, lax.conv_general_dilated)
    assert_close(self.grads(sparse, variables, x),
                 self.grads(dense, variables, x))

  def test_linen_dense_is_the_product_by_hand(self):
    x, dy = normal(6, 8), normal(6, 5, seed=2)
    layer = nn.Dense(5, dot_general=sparse_dot_general(SWAT))
    w = normal(8, 5, seed=1)
    variables = {'params': {'kernel': w, 'bias': jnp.zeros(5)}}
    _, dx, grads = quick_jit(functools.partial(
        passes, lambda x, v: layer.apply(v, x)))(x, variables, dy)
    want = by_hand(matmul, matmul_backward, SWAT, x, w, dy)
    assert_close((dx, grads['params']['kernel'], grads['params']['bias']),
                 (*want[1:], dy.sum(0)))

  @parameterized.named_parameters(
      ('linear', lambda: nnx.Linear(
          8, 5, dot_general=sparse_dot_general(SWAT), rngs=nnx.Rngs(0))),
      ('einsum', lambda: nnx.Einsum(
          'bi,io->bo', (8, 5), einsum_op=sparse_einsum(SWAT),
          rngs=nnx.Rngs(0))))
  def test_nnx_layers_are_the_product_by_hand(self, make):
    x, dy = normal(6, 8), normal(6, 5, seed=2)
    layer = make()
    w = np.asarray(layer.kernel[...])
    graph, params = nnx.split(layer)
    grads = quick_jit(jax.grad(lambda params, x: jnp.vdot(
        nnx.merge(graph, params)(x), dy), (0, 1)))(params, jnp.asarray(x))
    want = by_hand(matmul, matmul_backward, SWAT, x, w, dy)
    assert_close((grads[1], grads[0]['kernel'][...]), want[1:])

  def test_nnx_convolution_is_that_of_linen(self):
    x = jnp.asarray(normal(2, 4, 4, 2))
    conv = sparse_conv_general_dilated(SWAT)
    layer = nnx.Conv(2, 5, (3, 3), conv_general_dilated=conv,
                     rngs=nnx.Rngs(0))
    other = nn.Conv(5, (3, 3), conv_general_dilated=conv)
    variables = {'params': {'kernel': layer.kernel[...],
                            'bias': layer.bias[...]}}
    np.testing.assert_array_equal(
        quick_jit(lambda x: layer(x))(x),
        quick_jit(lambda x: other.apply(variables, x))(x))


GOOD = (jnp.ones((4, 6)), jnp.ones((6, 2)), MATMUL)


class ErrorTest(parameterized.TestCase):

  @parameterized.parameters(
      (dict(operands=.5), r'`operands` \(=0.5\)'),
      (dict(operands=Operands(1.)), r'`forward_weight` \(=1.0\)'),
      (dict(operands=Operands(output_gradient=-.1)), '`output_gradient`'),
      (dict(operands=Operands(backward_activation='x')),
       '`backward_activation`'),
      (dict(weight='rhs'), "`weight` .*'rhs'"),
      (dict(activation_scope='unified'), "`activation_scope` .*'unified'"),
      (dict(activation_scope=0), r'`activation_scope` \(=0\)'),
      (dict(activation_scope=3), r'`activation_scope` \(=3\) must divide'),
      (dict(gradient_scope='batch'), "`gradient_scope` .*'batch'"),
      (dict(structure='block'), "`structure` .*'block'"),
      (dict(structure=sparse_jax.NM(1, 2), operands=Operands(.75)),
       r'`forward_weight` \(=0.75\)'),
      (dict(batch_axes=1), r'`batch_axes` \(=1\)'),
      (dict(batch_axes=(3,)), r'`batch_axes` \(=\(3,\)\)'),
      (dict(pack='yes'), "`pack` .*'yes'"),
      (dict(thresholds=first_thresholds(), gradient_scope='example'),
       '`gradient_scope` .*`thresholds`'),
      (dict(thresholds=first_thresholds(), structure=sparse_jax.NM(2, 4),
            operands=Operands(.5)), '`structure` .*threshold'))
  def test_a_bad_argument_is_named_with_its_value(self, arguments, message):
    arguments = {'operands': Operands(.5)} | arguments
    with self.assertRaisesRegex(ValueError, message):
      sparse_dot_general(**arguments)(*GOOD)

  def test_examples_must_come_first(self):
    dot = sparse_dot_general(Operands(.5), activation_scope='example')
    with self.assertRaisesRegex(ValueError, '`activation_scope` .*example'):
      dot(GOOD[0].T, GOOD[1], (((0,), (0,)), ((), ())))

  @parameterized.parameters('bi,io', 'bi,io,oj->bj', 'bi,i...->b...')
  def test_subscripts_must_name_two_operands_and_an_output(self, subscripts):
    with self.assertRaisesRegex(ValueError, '`subscripts`'):
      sparse_einsum(Operands(.5))(subscripts, *GOOD[:2])


if __name__ == '__main__':
  absltest.main()
