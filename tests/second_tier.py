"""What `pytest` by itself leaves out: long products of tables, and hosts.

Each law stands in the first tier at least once. An entry of `SECOND` is a
pattern of tests, a pattern of their rows that stay in the first tier, and what
holds the same law there. `pytest --tier=all` runs everything, as does
`pytest FILE` of a file; `.ci/run` runs one tier after the other.
"""

import re

NOTHING = '(?!)'
METHOD = r"'(rigl|top_kast|str_)'"

SECOND = (
    # Every method, under every optimizer, dtype, structure and mesh.
    ('methods_test.*_no_argument_is_accepted', r"'static'",
     'one method; others have tests of their own arguments'),
    ('methods_test.*hold_in_both_frameworks', NOTHING,
     'counts in LawTest, linen and NNX in clients/'),
    ('methods_test.*_is_the_inner_optimizer', NOTHING,
     'dense() is the loop without a method, bit for bit, in clients/'),
    ('methods_test.*_counts_are_exact_after_every', r"'(rigl|top_kast|gmp)'",
     'three methods, each allocation'),
    ('methods_test.*_counts_of_all_leaves', r"'snip_global'", 'one method'),
    ('methods_test.*(_eager_update|_is_what_the_update|_depends_on_key)',
     METHOD, 'three methods'),
    ('optimizers_test.*_keep_their_laws_under', r"'(adamw|adafactor|lion)'",
     'three kinds of state'),
    ('optimizers_test.*(_around|_inside)',
     r"'(chain_clip_by_global_norm|ema|schedule_free)'", 'three wrappers'),
    ('precision_test.*HalfTest.*(dtypes|counts|ranking|zero|identical)',
     NOTHING, 'MixedTest; the same laws in float32 in methods_test'),
    ('precision_test.*whatever_the_weights', NOTHING,
     'NaN and inf in topk_test'),
    ('precision_test.*(16_bit_gradients|64_bit_mode|FlagsTest)', METHOD,
     'three methods'),
    ('package_test.*_misspelt_argument', NOTHING,
     'py.typed is in the wheel; .ci/run reads the library by mypy'),
    ('accounting_test.*_budget_that_moves', '2$', 'SWAT-M'),
    ('bound_grown_test.*_outsteps', r"'adam'", 'one optimizer'),
    ('aged_adam_test.*_while_nothing', '[01]$', 'two rows'),
    ('checkpoint_law_test', NOTHING,
     'experiments_test: every_part_of_the_state_continues'),
    ('storage_test.*test_every_method', r"'(rigl|top_kast)'", 'two methods'),
    ('storage_test.*_dense_weights_size', r"'top_kast'", 'one method'),
    ('storage_test.*(every_optimizer|other_kernels)', NOTHING,
     'Adam in test_every_method; kernels in products_test, loop_test'),
    ('sharding_test.*_eager_init', r"'rigl'.*auto",
     'one kind of axes; a step has both'),
    ('sharding_test.*ShardedWeightsTest', r"'rigl'", 'one method'),
    ('sharding_test.*DataParallelTest', NOTHING, 'ShardedWeightsTest'),
    ('packed_devices_test.*_is_the_masked_one', r"rigl.*fsdp.*auto",
     'one method, one mesh'),
    ('packed_devices_test.*collectives_are', r"auto|'fsdp'",
     'explicit axes under FSDP'),
    ('packed_devices_test.*(sums_rows|over_devices)', NOTHING,
     'collectives_are_those_of_dense'),
    ('residuals_devices_test.*_nothing_moves', r"Auto.*8", 'one scope'),
    ('operators_test.*_an_explicit_mesh', r'scope=8\)', 'one scope'),
    ('topk_test.*_never_gathered', r"Auto.*\('x', 'y'\)", 'two layouts'),
    ('topk_test.*_take_few', r"'equal'", 'one kind of ties'),
    ('marks_test.*best_groups', r"'(dense|conv|stacked_middle)'",
     'three layouts'),
    ('(kernels|launch_compiling)_test.*::CompileTest', NOTHING,
     'by a TPU compiler; lowered and interpreted in kernels_test'),
    ('kernels_test.*programs_for', '(32|128)\\)', 'two sizes'),
    ('kernels_test.*(_finds_no_race|named_kernels)', NOTHING,
     'the same products in interpret mode'),
    ('residuals_test.*an_unrolled_network', NOTHING, 'a scanned network'),
    ('one_shot_test.*OneShotTest.*test_structures', 'sparsegpt.*(Block|NM)',
     'two structures'),
    ('one_shot_test.*views_and_moments',
     r"'(dense|query|experts|conv|grouped)'", 'five products'),
    ('one_shot_test.*slow_reference', '[0-3]$', 'four rows'),
    ('one_shot_test.*_sees_the_pruned', '0$', 'one row'),
    ('one_shot_test.*(_scanned_layers_are|_mixed_precision|_published_order'
     '|_n_of_m_along)', NOTHING, 'LayersTest, test_structures'),
    ('effective_sparsity_test.*ExactTest', '[0-2]$', 'three graphs of each'),
    ('official_options_test', '0$', 'one row of each'),
    ('injection_test.*(by_hand|has_its_own)', '0$', 'one row'),
    ('loop_test.*_in_any_use', "0$", 'one use'),
    ('storage_test.*(_restored_from|_side_by_side|_accumulated_outside)', '0$',
     'one method'),
    ('(granet_test|redistribution_test|fan_in_test|spartan_test)'
     '.*(_move_no_budget|_momentum_gains|_stack_has|_one_factor)', NOTHING,
     'the trajectories of the same files'),
    ('(granet_test|fan_in_test|spartan_test).*_of_the_slow_loop', '0$',
     'one row'),
    ('scaling_test.*_depend_on_neither', '64.*75', 'one width'),
    ('top_kast_test.*_largest_weights', '[01]$', 'two rows'),
    ('cost_test.*CifarTest', '(vgg|wrn|resnet18)', 'three networks'),
    # Loops in the manner of others. All laws in two of them.
    ('clients/(?!train_state|nnx_split).*_every_law_holds_with', NOTHING,
     'TrainStateTest (linen) and ObjectsTest (NNX)'),
    ('clients/.*_every_law_holds_with', r"'(dense|rigl|packed_rigl)'",
     'three methods'),
    ('clients/nnx_modules_test', 'dropout_draws|StacksTest', 'getters_test'),
    ('clients/nnx_split_test.*ArraysTest', NOTHING, 'ObjectsTest'),
    ('clients/anybody_test.*what_is_learnt', r"'str_'", 'one method'),
    ('clients/anybody_test.*AxesTest', NOTHING,
     'contracting_axes in selection_test'),
    # Programs: every method, network, fault and number of hosts.
    ('experiments_test.*leaves_results', r"'top_kast'", 'one method'),
    ('experiments_test.*(effective_sparsity|masks_are_compared|DevicesTest)',
     NOTHING, 'effective_sparsity_test, reporting_test, sharding_test'),
    ('experiments_test.*ContinueTest.*killed_and_then', NOTHING,
     'every_part_of_the_state_continues'),
    ('language_train_test.*(RunTest|SamplingTest)', NOTHING,
     'the same loop in experiments_test, the model in language_models_test'),
    ('language_models_test.*those_of_the_shapes', '0$', 'one preset'),
    ('reporting_test.*test_lines', '0$', 'one scale'),
    ('language_models_test.*SparseTest', NOTHING,
     'injection_test, flags_test'),
    ('slurm_test', NOTHING, 'the golden scripts of launch_backends_test'),
    ('survival_test.*(HostsTest|KillTest)', NOTHING, 'FaultTest'),
    ('faults_test.*HostsTest', NOTHING, 'flags of one host'),
    ('faults_test.*(is_full_while_saving|second_start)', NOTHING,
     'checkpointing_test, locks of cells in launch_run_test'),
    ('checkpointing_test.*(kill_while|two_processes)', NOTHING,
     'truncated and damaged files'),
    ('image_data_test.*two_processes', NOTHING, 'one process'),
    ('flags_test.*_trains_under_structure', r"'(rigl|top_kast)'",
     'two methods'),
    ('flags_test.*(own_order|docstring_builds|made_at_its_width)', NOTHING,
     'order in allocation_test, recipes in launch_tables_test'),
    ('image_models_test.*ModelsTest', r"'(mlp|resnet20|mobilenet_v1)'",
     'three networks'),
    ('image_models_test.*(known_ones|is_as_large_as)', '[01]$',
     'two networks of each'),
    ('flags_test.*_aged_ones', '0$', 'Adam'),
    ('image_models_test.*(_is_near_the_published_width|lowers_the_loss'
     '|BatchNormTest)', NOTHING, 'widths of smaller networks; whole runs'),
    ('filter_pruning_test.*(StudyTest|fits)', NOTHING,
     'computes_what_the_larger_does'),
    ('prune_test.*StudyTest', NOTHING, 'one_shot_test'),
    ('(accelerator_study|permuted_blocks|supar|scaling_law)_test'
     '.*(_a_run_leaves|seed_draws|and_pictures|SuparStudy|_draws_a_table)',
     NOTHING, 'accelerator_test, permuting_test, scaling_test'),
    ('launch_tables_test.*(_every_cell|DescribeTest|make_no_run)', NOTHING,
     'launch_run_test has a table of its own'),
    # Documentation.
    ('docs_test.*snippets_of_a_page', 'quick_start', 'the README, a page'),
)


def check_all_found(items) -> None:
  """Raises ValueError for an entry of SECOND that is found in no test."""
  for tests, _, _ in SECOND:
    if not any(re.search(tests, item.nodeid) for item in items):
      raise ValueError(f'second_tier.py: {tests!r} is found in no test.')


def is_long(item) -> bool:
  """Whether pytest's item is of the second tier."""
  rows = next((rows for tests, rows, _ in SECOND
               if re.search(tests, item.nodeid)), None)
  if rows is None:
    return False
  # What absl says of a row: its name is but a number.
  parameters = getattr(item.obj, '__x_params_repr__', '')
  return not (re.search(rows, parameters) or re.search(rows, item.nodeid))
