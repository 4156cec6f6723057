"""Takes features of qjax away, one at a time, and expects a test to fail for each.

    python scripts/mutate.py              all mutants of the table
    python scripts/mutate.py --only NAME  those named, one or more
    python scripts/mutate.py --list       what there is, changing nothing

Each mutant replaces one piece of text in one file of a temporary copy of the package and runs the narrow tests that
guard it there; the working tree is never touched. First those tests run on the copy as it is, where all must pass.

    killed      a test failed by an assertion: the feature is guarded
    SURVIVED    all tests passed without the feature: they assert too little. Let one assert the feature's gain, against
                an independent reference, with a margin: "never worse" passes wherever a guard keeps the start.
    CRASHED     a test ended otherwise: the change breaks the program instead of the feature. Write it differently.

Exit status: 0 all killed, 1 something survived, 2 the table is out of date (a text that is not there exactly once, a
test that does not exist), a mutant crashed, or the tests fail before any change.

A mutant of your own is a line of MUTANTS. Take short texts that other edits are unlikely to move, and tests that take
a second or two: with compiled programs kept (tests/conftest.py) a mutant takes about a dozen, mostly imports.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change and the tests that must notice it.

    Attributes:
      name: of the mutant, for --only.
      path: the file, under qjax/.
      old: text that is in the file exactly once.
      new: what takes its place.
      tests: node ids under tests/, without spaces.
    """

    name: str
    path: str
    old: str
    new: str
    tests: str

    @property
    def file(self) -> str:
        return f"qjax/{self.path}"

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(f"tests/{test}" for test in self.tests.split())


REPARAM, REPARAM_GAINS = "reparam/test_reparam.py::", "reparam/test_reparam_gains.py::"
GAINS, IDENTITIES = "rounding/test_rounding_gains.py::", "rounding/test_identities.py::"
FIGURES = "report/test_figures.py::"
KERNELS = "kernels/test_products.py::"
BAD, INTEGER = "rounding/test_bad_input.py::", "formats/test_integer.py::"

# fmt: off
MUTANTS = (
    Mutant("rescale-no-op", "reparam/scale.py", "** 0.25", "** 0.0",
           REPARAM_GAINS + "test_rescale_reaches_the_least_bound_of_all_diagonals"),
    Mutant("permute-reversed", "reparam/permute.py", "jnp.argsort(-key)", "jnp.argsort(key)",
           REPARAM_GAINS + "test_permute_puts_the_largest_first"),
    Mutant("smooth-without-alpha", "reparam/scale.py", "** self.alpha /", "** 0.5 /",
           REPARAM_GAINS + "test_smooth_shares_the_outliers_out_by_alpha"),
    Mutant("awq-by-diagonal", "reparam/scale.py", "H, mean_w = stats.H,",
           "H, mean_w = jnp.diag(jnp.diagonal(stats.H)),",
           REPARAM_GAINS + "test_awq_finds_the_best_power_in_the_metric_of_H[False]"),
    Mutant("awq-without-duo", "reparam/scale.py", "    if duo:", "    if False:",
           REPARAM_GAINS + "test_awq_finds_the_best_power_in_the_metric_of_H[True]"),
    Mutant("low_rank-unweighted", "reparam/split.py", "d = _root(site.stats)", "d = jnp.ones_like(_root(site.stats))",
           REPARAM_GAINS + "test_low_rank_is_the_best_of_its_rank_in_the_metric_of_h"),
    Mutant("columns-smallest", "reparam/split.py", "jnp.argsort(-size)", "jnp.argsort(size)",
           REPARAM + "test_outliers_in_the_inputs"),
    Mutant("sparse-without-h", "reparam/split.py", 'size = size * statistic(site.stats, "h", "sparse")[None, :]',
           "pass",
           REPARAM + "test_outliers_are_stored_exactly"),
    Mutant("sparse-not-settled", "reparam/split.py", "values=fp16(w[at] - w_hat[at])", "values=fp16(w_hat[at])",
           REPARAM + "test_outliers_are_stored_exactly"),
    Mutant("seed-of-most-loss", "reparam/rotate.py", "jnp.argmin(lax.map(loss", "jnp.argmax(lax.map(loss",
           REPARAM + "test_best_of_seeds_is_the_best"),
    Mutant("damping-dropped", "rounding/curvature.py", "return H + damping *", "return H + 0.0 *",
           GAINS + "test_refitted_scales_and_offsets_are_least_squares"),
    Mutant("ladder-not-climbed", "rounding/curvature.py", "failed(c) & (i <", "failed(c) & (i > ",
           BAD + "test_the_least_damping_that_suffices_is_taken_and_reported[-0.08-0.1]"),
    Mutant("noise-not-checked", "rounding/curvature.py", "bad = failed(c) |", "bad = failed(c) | False &",
           BAD + "test_a_diagonal_below_noise_is_told_though_the_factor_exists"),
    Mutant("dead-columns-stay-dead", "rounding/curvature.py", "dead = (h <= 0) &", "dead = (h < 0) &",
           BAD + "test_dead_columns_ask_for_nothing_in_a_descent"),
    Mutant("act-order-ignored", "rounding/curvature.py", 'if order == "natural":', 'if order in ("natural", "act"):',
           IDENTITIES + "test_expected_losses_of_a_fine_grid[act]"),
    Mutant("nearest-ignores-h", "rounding/nearest.py", 'if self.weight == "h" else None', "if False else None",
           GAINS + "test_nearest_by_h_errs_where_inputs_are_small"),
    Mutant("ldlq-without-cross-term", "rounding/ldlq.py", "        if self.cross:", "        if False:",
           IDENTITIES + "test_the_cross_term_brings_the_outputs_nearer"),
    Mutant("ldlq-without-feedback", "rounding/ldlq.py", "jnp.zeros_like(x), feedback(factor.c, tile),",
           "jnp.zeros_like(x), 0.0 * factor.c,",
           IDENTITIES + "test_expected_losses_of_a_fine_grid[act]"),
    Mutant("descend-no-op", "rounding/descend.py", "lax.fori_loop(0, self.sweeps,", "lax.fori_loop(0, 0,",
           IDENTITIES + "test_more_sweeps_do_not_raise_the_loss"),
    Mutant("tiles-without-their-metric", "rounding/ldlq.py",
           "outer_of(tile), lower=True, metric=own_metric(factor.c, tile),", "outer_of(tile), lower=True, metric=None,",
           "rounding/test_toys.py::test_feedback_and_descent_hand_over_the_metric_of_a_tile[ldlq]"),
    Mutant("outliers-rounded-again", "rounding/descend.py", "metric=own, reach=reach)", "metric=own, reach=None)",
           "rounding/test_toys.py::test_every_stage_takes_it[table]"),
    Mutant("tables-refitted-by-one-entry", "rounding/refit.py", "if len(p) == 2:", "if len(p) > 2:\n        return p",
           "rounding/test_toys.py::test_a_table_is_refitted_to_what_least_squares_says"),
    Mutant("refit-takes-every-step", "rounding/refit.py", "better = gain > 0", "better = gain > -jnp.inf",
           GAINS + "test_refit_leaves_steps_that_are_bad_once_stored"),
    Mutant("refit-without-offsets", "rounding/refit.py", "ok = det > _RIDGE * a * c", "ok = det < 0.0",
           GAINS + "test_refitted_scales_and_offsets_are_least_squares"),
    Mutant("refit-without-codes", "rounding/refit.py", "            if sweeps:", "            if False:",
           GAINS + "test_refit_goes_below_all_scales_at_the_codes_it_was_given"),
    Mutant("clip-without-guard", "rounding/clip.py", "return chosen(state, new, last < first)", "return new",
           GAINS + "test_clip_keeps_rows_that_lose_once_their_scales_are_stored_together"),
    Mutant("clip-by-diagonal", "rounding/clip.py", "return tiles_of(H, size)",
           "return jnp.diagonal(H).reshape(-1, size)",
           "rounding/test_clip.py::test_it_is_the_search_by_hand"),
    Mutant("learned-without-guard", "rounding/gradient.py", "return keep_better(state, new, format, before, H)[0]",
           "return new",
           GAINS + "test_learned_keeps_rows_that_found_nothing_better"),
    Mutant("learned-ranges-alone", "rounding/learned.py", 'offset + width * p["v"]', "offset",
           "rounding/test_learned.py::test_the_loss_is_that_of_the_published_loop"),
    Mutant("learned-without-ranges", "rounding/learned.py", "shares(format, columns) if self.ranges else None", "None",
           "rounding/test_learned.py::test_the_loss_is_that_of_the_published_loop"),
    Mutant("hqq-without-turns", "rounding/hqq.py", "lax.fori_loop(0, self.iterations,", "lax.fori_loop(0, 0,",
           "rounding/test_hqq.py::test_zeros_and_codes_are_the_best_of_the_published_path"),
    Mutant("hqq-without-shrinking", "rounding/hqq.py", "off - shrink(off - m[..., None], p, beta)", "off",
           "rounding/test_hqq.py::test_zeros_and_codes_are_the_best_of_the_published_path"),
    Mutant("two-sided-without-debts", "rounding/two_sided.py", "return now + lax",
           "return now + 0 * lax",
           "rounding/test_two_sided.py::test_rows_that_make_up_for_each_other_lose_less"),
    Mutant("two-sided-unasked", "rounding/two_sided.py", "a, least / alone, size", "a, 0.5, size",
           "rounding/test_two_sided.py::test_held_out_tokens_say_how_far_g_is_believed"),
    Mutant("spqr-without-threshold", "rounding/spqr.py", "tau = self.threshold *", "tau = 0.2 *",
           "rounding/test_spqr.py::test_it_is_the_published_loop[1.0]"),
    Mutant("spqr-without-leave-one-out", "rounding/spqr.py", "if self.loo else w", "if False else w",
           "rounding/test_spqr.py::test_spikes_leave_their_groups_range"),
    Mutant("no-fine-stage", "formats/integer_search.py", "lax.scan(around, coarse, moves)", "(coarse, None)",
           INTEGER + "test_the_search_looks_between_the_pairs_of_ends"),
    Mutant("no-polish", "formats/integer_scales.py", "_POLISH = 3", "_POLISH = 0",
           INTEGER + "test_the_search_ends_where_least_squares_moves_nothing"),
    Mutant("no-nudged-scale-codes", "formats/integer_scales.py", "(-1, 1) if nested else ()", "()",
           INTEGER + "test_nested_scales_are_near_the_best_super_scale"),
    Mutant("no-spare-scale-codes", "formats/integer_scales.py", "range(3 if nested else 1)", "range(1)",
           INTEGER + "test_nested_scales_are_near_the_best_super_scale"),
    Mutant("integers-ignore-the-weight", "formats/integer_scales.py", "        assert x is not None\n",
           "        h = None\n",
           INTEGER + "test_a_weight_guides_the_search"),
    Mutant("codebooks-not-searched", "formats/codebook.py", "better = error(searched) <",
           "better = -error(searched) >",
           "formats/test_codebook.py::test_a_weight_never_raises_the_weighted_error"),
    Mutant("clipped-passes-all", "training/grid/estimators.py", "jnp.where(place.inside(self.reach), g, 0.0)", "g",
           "training/test_fake_quant.py::test_clipped_stops_what_lies_outside"),
    Mutant("mask-ignored", "training/losses/distill.py", "weight = mask.astype(jnp.float32)",
           "weight = jnp.ones(mask.shape, jnp.float32)",
           "training/test_language_loss.py::test_only_targets_of_the_mask_count"),
    Mutant("temperature-ignored", "training/losses/distill.py", "logits.astype(jnp.float32) / temperature, axis=-1",
           "logits.astype(jnp.float32), axis=-1",
           "training/test_language_loss.py::test_only_targets_of_the_mask_count"),
    Mutant("qat-from-scratch", "training/grid/qat.py",
           "masters = params if rounded is None else weights.started(params, rounded, quantizers)", "masters = params",
           "training/test_qat.py::test_it_goes_on_from_any_recipe"),
    Mutant("KL-the-other-way-round", "evaluate/vocabulary.py",
           "d = jnp.where(own, z, 0.0) - jnp.where(own, z_base, 0.0)",
           "d = jnp.where(own, z_base, 0.0) - jnp.where(own, z, 0.0)",
           "evaluate/test_judging.py::test_kl_keeps_its_digits_where_it_is_tiny"),
    Mutant("html-without-reparametrizations", "tensor.py", "for one in self.applied or ())]", "for one in ())]",
           "test_reprs.py::test_a_packed_weight_shows_what_is_stored"),
    Mutant("html-without-options", "recipes/composed.py",
           "for field, value in self._chosen]", "for field, value in ()]",
           "test_reprs.py::test_a_recipe_shows_its_steps"),
    Mutant("signs-not-flipped", "evaluate/intervals.py", "signs = 1 - 2 * (", "signs = 1 + 0 * (",
           "evaluate/test_intervals.py::test_the_chance_of_a_gain_is_that_of_all_signs[5]"),
    Mutant("named-model-stays-packed", "io/checkpoint.py", "params=model.dense)", "params=model.params)",
           "io/test_smollm2.py::test_the_file_of_the_package_is_the_model"),
    Mutant("tensorboard-without-steps", "report/tensorboard.py", 'if _is_number(row.get("step")) else', "if False else",
           "test_tensorboard.py::test_logs_become_scalars_and_configs_hparams"),
    Mutant("scales-do-not-drift", "training/grid/weights.py",
           "sum(jnp.sum(x * x) for x in moved)", "sum(0.0 for x in moved)",
           "training/test_curve.py::test_drift_is_how_far_learned_scales_moved"),
    Mutant("labels-on-labels", "report/figures/labels.py", "taken.append(Box(box.x", "tuple((box.x",
           FIGURES + "test_labels_of_the_figure_lie_apart[900.0-0]"),
    Mutant("phone-with-every-name", "report/figures/pareto.py", "on or width != SLIM", "True",
           FIGURES + "test_labels_of_the_figure_lie_apart[340.0-0]"),
    Mutant("bits-per-tensor", "report/figures/by_layer.py", "kept[1] += 8.0 * total / bits", "kept[1] += total",
           FIGURES + "test_bits_of_a_layer_are_those_of_all_its_weights"),
    Mutant("bins-tower", "report/figures/histogram.py", "2.5 * max(before)", "99.0 * max(before)",
           FIGURES + "test_a_bin_that_towers_is_cut_off"),
    Mutant("lift-in-float32", "lifting/run.py", "jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if",
           "jax.ShapeDtypeStruct(leaf.shape, jnp.float32) if",
           "lifting/test_lift_types.py::test_lookups_and_dots_have_the_programs_type"),
    Mutant("experts-not-told-apart", "lifting/picked.py", "where = [e == k for", "where = [e == e + 0 * k for",
           "calibrate/test_experts_and_axes.py::test_gathered_experts_have_the_sums_of_their_own_tokens[one]"),
    Mutant("joined-inputs-alike", "lifting/uses.py", "piece = None if own is x else k", "piece = None",
           "calibrate/test_joined_weights.py::test_fused_qkv_and_stacked_experts_are_seen_part_by_part"),
    Mutant("lift-compiled-anew", "lifting/apply.py", "    if key in _COMPILED:", "    if not key:",
           "lifting/test_lift_cache.py::test_a_second_call_compiles_nothing"),
    Mutant("yarn-all-frequencies", "models/rotary.py", "blend = 1 - jnp.clip(along, 0.0, 1.0)",
           "blend = 0.0 * along", "models/test_decoder.py::test_yarn_keeps_fast_and_divides_slow_frequencies"),
    Mutant("longrope-always-short", "models/rotary.py", "jnp.asarray(length) > scaling.original_max_position",
           "jnp.asarray(length) < 0", "models/test_decoder.py::test_longrope_divides_by_the_text_so_far"),
    Mutant("metadata-not-kept", "io/gguf_model.py",
           "return said | {key: value for key, value in kept.items() if key not in said}", "return said",
           "io/test_kept.py::test_gguf_metadata_of_every_type_survive"),
    Mutant("metadata-in-usual-types", "io/gguf_read.py", "if kind is None:\n            return value",
           "if True:\n            return value",
           "io/test_kept.py::test_gguf_metadata_of_every_type_survive"),
    Mutant("one-shard", "io/safetensors.py", "held + size > shard_bytes", "held + size < 0",
           "io/test_kept.py::test_shards_are_what_the_single_file_is"),
    Mutant("dtype-kept-at-any-price", "io/huggingface.py", "return dtype if same else", "return dtype if True else",
           "io/test_kept.py::test_weights_that_bfloat16_cannot_hold_are_saved_as_float32"),
    Mutant("experts-see-all", "models/mlp.py", "jnp.where(chosen, read", "jnp.where(chosen | True, read",
           "calibrate/test_expert_stats.py::test_statistics_are_each_experts_own"),
    Mutant("cross-of-the-unknown", "calibrate/moments.py", "x_float - x, 0.0)", "x_float - x, x_float - x)",
           "calibrate/test_expert_stats.py::test_the_cross_term_is_of_tokens_that_both_models_send_there"),
    Mutant("biased-experts-see-all", "models/mlp.py", "if seen is not None:", "if False:",
           "pipeline/test_walk_experts.py::test_each_expert_is_rounded_to_its_own_tokens_and_one_with_few_to_all[gpt_oss]"),
    Mutant("mxfp4-in-published-order", "io/expert_stacks.py", "codes[..., :16] | codes[..., 16:] << 4",
           "codes[..., ::2] | codes[..., 1::2] << 4",
           "io/test_expert_stacks.py::test_mxfp4_is_read_without_loss"),
    Mutant("all-groups-of-experts", "models/mlp.py", "    if c.expert_groups:", "    if False:",
           "models/test_routing.py::test_choice_and_shares[deepseek_v3]"),
    Mutant("bias-of-the-choice-in-shares", "models/mlp.py", "jnp.where(chosen, p, 0.0)", "jnp.where(chosen, rank, 0.0)",
           "models/test_routing.py::test_choice_and_shares[deepseek_v3]"),
    Mutant("few-not-filled", "pipeline/few_tokens.py", "t * a + (1 - t) * b", "a + 0 * b",
           "pipeline/test_walk_experts.py::test_filling_up_goes_over_into_an_experts_own_statistics"),
    Mutant("parts-on-one-device", "pipeline/parts.py", "jax.local_devices()[: len(own)]", "jax.local_devices()[:1]",
           "pipeline/test_on_devices.py::test_parts_on_devices_are_the_rows_of_the_weight"),
    Mutant("steps-on-one-device", "models/devices.py", "devices = jax.process_count(), jax.local_devices()",
           "devices = jax.process_count(), jax.local_devices()[:1]",
           "models/test_steps_on_devices.py::test_every_step_has_a_device_and_comes_in_order"),
    Mutant("processes-not-compared", "processes.py", "if not np.array_equal(other, own):", "if False:",
           "test_processes.py::test_two_processes_know_what_the_others_have_and_end_together"),
    Mutant("router-rounded", "plan/rules.py", "passed_by = w.spared and", "passed_by = False and",
           "io/test_expert_files.py::test_packed_stacks_keep_their_bytes"),
    Mutant("values-not-normed", "models/attention.py", "v = unit(v, c.norm_eps) if c.v_norm else v", "v = v",
           "models/test_decoder.py::test_logits_equal_transformers[gemma4]"),
    Mutant("all-of-a-head-turns", "models/rotary.py", "scaling.factor, STILL)", "scaling.factor, scaling.factor)",
           "models/test_families.py::test_layers_of_gemma4_have_sizes_of_their_own"),
    Mutant("layers-of-one-size", "models/config.py", "self.global_kv_heads or self.kv_heads", "self.kv_heads",
           "models/test_families.py::test_layers_of_gemma4_have_sizes_of_their_own"),
    Mutant("experts-all-alike", "models/beside.py", "share = share * scale[", "share = share * 0 + scale[",
           "models/test_decoder.py::test_logits_equal_transformers[gemma4-experts]"),
    Mutant("delta-rule-only-adds", "models/linear_attention.py", "(v - grown * (k @ S))", "v",
           "models/test_linear_attention.py::test_chunks_are_the_recurrence[5]"),
    Mutant("padding-is-remembered", "models/linear_attention.py", "real = (positions >= 0)", "real = (positions >= -1)",
           "models/test_linear_attention.py::test_padding_leaves_no_trace_in_memory"),
    Mutant("value-heads-as-they-come", "io/linear_heads.py", "or rule.value_heads == rule.key_heads:", "or True:",
           "models/test_decoder.py::test_logits_equal_transformers[qwen3_5]"),
    Mutant("qkvz-as-it-lies", "io/linear_heads.py", "np.concatenate(qkv), z", "np.sort(np.concatenate(qkv)), z",
           "io/test_linear_files.py::test_what_a_folder_holds"),
    Mutant("convolution-rounded", "plan/rules.py", '"a convolution": (("linear_attn/conv",',
           '"a convolution": (("linear_attn/none",',
           "test_plan.py::test_convolutions_are_spared_but_by_rules_that_name_them"),
    Mutant("router-in-half", "models/families/weight_names.py", '("ffn_gate_inp.weight", "ssm', '("ssm',
           "io/test_expert_files.py::test_a_gguf_file_has_stacks_and_float_routers[mixtral]"),
    Mutant("gradient-keeps-dense-weights", "kernels/product.py", "return _mapped(how)(x, leaves), (x, leaves)",
           "return _mapped(how)(x, leaves), (x, leaves | {'w': how.format.decode(*how.format.unpack(leaves))})",
           KERNELS + "test_gradients_decode_again_and_keep_packed_weights"),
    Mutant("experts-decoded-at-once", "kernels/product.py", 'if kernel.stack == "map" else', "if False else",
           KERNELS + "test_vmap_over_weights_decodes_one_after_another"),
    Mutant("blocks-not-summed-over", "kernels/partition.py", "summed = _names(along)", "summed = ()",
           KERNELS + "test_a_mesh_multiplies_where_the_packed_weights_lie[Q4_0-weights1-inputs1-output1-moved1]"),
    Mutant("sums-of-few-bits", "kernels/xla.py", "jnp.round(x / unit)", "256 * jnp.round(x / unit / 256)",
           KERNELS + "test_sums_in_whole_numbers_keep_twenty_bits[Q4_0]"),
    Mutant("half-levels-without-half", "kernels/layouts/coding.py", "0.5 * levels.half", "0.0 * levels.half",
           "kernels/test_layouts.py::test_levels_are_the_formats[int3_g64_mid_mse]"),
    Mutant("shift-for-every-run", "kernels/mosaic_gpu/integers.py", "1 + (_MANTISSA - bits) // first", "1",
           "kernels/test_words.py::test_instructions_a_weight_are_those_of_the_budget[Q2_K-1.125]"),
    Mutant("table-of-eight", "kernels/mosaic_gpu/tables.py", "ops.shift(planes[0], 3)", "ops.shift(planes[0], 2)",
           "kernels/test_words.py::test_every_code_in_every_run_is_its_level[NF4]"),
    Mutant("kernel-without-minima", "kernels/mosaic_gpu/skeleton.py", "if o is not None:", "if False:",
           "kernels/test_mosaic_gpu.py::test_sums_are_rounded_and_nothing_else[Q4_1-64-160-2]"),
    Mutant("half-a-scale-a-step", "kernels/layouts/scales.py",
           "return all(n == 1 or columns % (K // n) == 0 or K // n % columns == 0 for n in counts)", "return True",
           "kernels/test_mosaic_tpu.py::test_sums_are_rounded_and_nothing_else[Q4_K-128-1280-17-16]"),
    Mutant("few-programs", "kernels/mosaic_gpu/tiles.py", "_PROGRAMS = 512", "_PROGRAMS = 128",
           "kernels/test_mosaic_gpu.py::test_plans_fit[Q8_0]"),
    Mutant("layout-made-at-each-call", "kernels/prepacked.py", "if format.layout == layout:", "if False:",
           KERNELS + "test_prepacked_weights_are_the_same_weights"),
    Mutant("packed-parts-decoded", "models/parts.py", "return self.model.params[name]", "return self.model.part(name)",
           "models/test_packed_generation.py::test_weights_are_prepacked_once_for_the_kernel_of_a_step"),
    Mutant("one-matrix-timed-again", "bench/products.py", "jnp.roll(leaf, k, axis=0)", "jnp.roll(leaf, 0, axis=0)",
           "test_bench.py::test_every_product_of_a_program_has_weights_of_its_own"),
)
# fmt: on


def stale(root: Path, mutants: Sequence[Mutant] = MUTANTS) -> list[str]:
    """What no longer fits the tree, a line each: texts that are not there exactly once, tests that are not there."""
    lines = []
    for m in mutants:
        path = root / m.file
        count = path.read_text().count(m.old) if path.is_file() else 0
        if count != 1:
            lines.append(f"{m.name}: {m.file} has {m.old!r} {count} times; the table wants a text that it has once")
        for test in m.ids:
            file, _, function = test.partition("::")
            function = function.partition("[")[0]
            found = root / file
            if not (found.is_file() and re.search(rf"^def {re.escape(function)}\(", found.read_text(), re.MULTILINE)):
                lines.append(f"{m.name}: there is no test {test}")
    return lines


def copied(root: Path, to: Path) -> Path:
    """What tests need of the tree, without compiled files."""
    for name in ("qjax", "tests", "configs"):
        shutil.copytree(root / name, to / name, ignore=shutil.ignore_patterns("__pycache__", ".hypothesis"))
    shutil.copy(root / "pyproject.toml", to)
    return to


def tested(tree: Path, ids: Sequence[str]) -> tuple[int, str]:
    """pytest's exit status and its last words on the tests of a copy; it stops at the first failure."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "slow or not slow", "-p", "no:cacheprovider"]
    # Wide enough that pytest does not cut the reason of a failure off; plugins are only slow to import.
    env = os.environ | {"PYTHONPATH": str(tree), "COLUMNS": "400", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([*command, "--tb=line", *ids], cwd=tree, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def judged(status: int, output: str) -> tuple[str, str]:
    """The verdict on a mutant, and why."""
    if status == 0:
        return "SURVIVED", ""
    failed = re.search(r"^FAILED \S*?::(\S+)(?: - (.*))?$", output, re.MULTILINE)
    if status == 1 and failed:
        test, reason = failed[1], failed[2] or ""
        if reason.startswith(("assert", "AssertionError", "Failed: DID NOT RAISE")):
            return "killed", test
        return "CRASHED", f"{test}: {reason}"
    last = [line for line in output.splitlines() if line.strip()][-3:]
    return "CRASHED", f"pytest ended with {status}: " + " | ".join(last)


def run(mutants: Sequence[Mutant], tree: Path) -> int:
    """Run mutants on a copy; prints the table, returns the exit status."""
    ids = list(dict.fromkeys(test for m in mutants for test in m.ids))
    print(f"{len(mutants)} mutants, {len(ids)} tests; the tests first, on the code as it is ...", flush=True)
    begun = time.monotonic()
    status, output = tested(tree, ids)
    if status:
        print(output, file=sys.stderr)
        print("the tests fail before any change", file=sys.stderr)
        return 2
    print(f"{'passed':9} {time.monotonic() - begun:5.0f} s", flush=True)
    verdicts = []
    for m in mutants:
        path, begun = tree / m.file, time.monotonic()
        kept = path.read_text()
        path.write_text(kept.replace(m.old, m.new))
        # Python tells sources apart by size and second, which a change and its undoing may share.
        shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)
        try:
            verdict, why = judged(*tested(tree, m.ids))
        finally:
            path.write_text(kept)
            shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)
        verdicts.append(verdict)
        print(f"{verdict:9} {time.monotonic() - begun:5.0f} s  {m.name:28} {m.file:34} {why}", flush=True)
    survived, crashed = verdicts.count("SURVIVED"), verdicts.count("CRASHED")
    print(f"{verdicts.count('killed')} killed, {survived} survived, {crashed} crashed")
    return 1 if survived else 2 if crashed else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="mutants to run; all by default")
    parser.add_argument("--list", action="store_true", help="print the table and change nothing")
    options = parser.parse_args(argv)
    known = {m.name: m for m in MUTANTS}
    unknown = [name for name in options.only or () if name not in known]
    if unknown:
        print(f"no mutant {', '.join(unknown)}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    mutants = [known[name] for name in options.only or known]
    if options.list:
        for m in mutants:
            print(f"{m.name}\n    {m.file}: {m.old!r} -> {m.new!r}\n    {' '.join(m.ids)}")
        return 0
    lines = stale(ROOT, mutants)
    if lines:
        print("\n".join(lines), file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="qjax-mutants-") as folder:
        return run(mutants, copied(ROOT, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
