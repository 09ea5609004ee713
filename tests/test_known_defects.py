"""Defects of the procedure that users know, each with the tests that keep it from coming back.

The list is of `Kyyle2114/SAM-Adapter-Pytorch-Implementation` 66b0e9e and
`Kyyle2114/Fine-tuning-Segment-Anything` a7cf899. This file checks only that the named tests exist;
they do the work.
"""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

# defect, in words -> "file::test" that would fail if it were back
GUARDED = {
    "D1 gradients are not synchronised: each rank trains a model of its own": [
        "engine/test_ddp.py::test_ranks_hold_the_same_model",
        "engine/test_ddp.py::test_two_processes_train_what_one_would",
        "engine/test_ddp_check.py::test_what_is_broken_is_found_and_all_ranks_say_the_same",
    ],
    "D2 images and masks are paired by their position in an unsorted listing": [
        "data/test_files.py::test_pairs_by_name_whatever_order_the_folders_list",
        "data/test_files.py::test_missing_and_extra_partners_are_named_with_their_flags",
    ],
    "D3 running sums keep the graph of every batch of the epoch": [
        "engine/test_trainer.py::test_sums_hold_no_graph_and_equal_the_mean_over_samples",
        "metrics/test_region.py::test_scores_keep_no_graph_so_memory_stays_flat_over_an_epoch",
    ],
    "D4 the cosine stays flat, or falls and rises again, depending on the data's size": [
        "engine/test_optim.py::test_the_cosine_falls_and_ends_at_its_floor_for_any_data_size",
        "engine/test_trainer.py::test_the_learning_rate_told_per_epoch_falls_to_its_floor",
    ],
    "D5 rank 0 validates alone while the others wait": [
        "engine/test_evaluator.py::"
        "test_sharded_validation_equals_single_process_validation_for_any_set_size",
        "engine/test_ddp.py::test_scores_are_those_of_one_process",
    ],
    "D6 a loop over images, with copies to the host for resizing and boxes": [
        "data/test_datasets.py::test_the_worker_makes_image_and_box",
        "models/test_segmenter.py::test_no_loop_over_images_and_no_wait_for_the_device",
        "test_losses.py::test_no_loss_reads_a_value_back_from_the_device",
    ],
    "D7 masks coded 0/255 break the loss": [
        "data/test_datasets.py::test_every_mask_coding_trains_alike",
        "data/test_reading.py::test_every_plain_coding_gives_the_same_mask",
    ],
    "D8 an empty mask becomes a box at the origin, silently": [
        "data/test_datasets.py::test_the_policy_for_images_without_object",
        "data/test_transforms.py::test_an_object_that_would_be_lost_keeps_the_sample_as_it_is",
    ],
    "D9 a run of one epoch writes no checkpoint": [
        "engine/test_trainer.py::test_one_epoch_writes_a_best_checkpoint",
    ],
    "D10 the epoch that stops the run is neither told nor saved": [
        "engine/test_trainer.py::test_early_stopping_counts_epochs_without_improvement",
        "engine/test_trainer.py::"
        "test_the_improving_epoch_is_saved_even_if_it_is_the_last_before_stopping",
    ],
    "D11 files with and without `module.` do not load where they are needed": [
        "engine/test_checkpoint.py::test_the_parents_pth_is_read_with_and_without_module",
        "engine/test_checkpoint.py::test_the_parents_format_has_no_prefix_and_the_whole_mask_decoder",
    ],
    "D12 a quarter turn of pictures that are not square cannot be batched": [
        "data/test_datasets.py::test_turned_pictures_that_are_not_square_batch_for_many_epochs",
    ],
    "D13 statistics of a frozen BatchNorm drift": [
        "engine/test_trainer.py::test_frozen_parts_stay_in_eval_mode_through_a_run",
        "models/test_segmenter.py::test_frozen_batch_norm_keeps_its_statistics",
    ],
    "D14 pictures of different sizes cannot be batched": [
        "data/test_datasets.py::test_mixed_sizes_share_a_batch",
        "test_losses.py::test_images_of_mixed_size_in_one_batch_cost_what_each_costs_alone",
    ],
    "D15 stray files crash the loader, EXIF turns the image but not the mask": [
        "data/test_files.py::test_stray_files_and_case_of_extensions",
        "data/test_reading.py::test_images_are_turned_as_their_exif_tag_says",
        "data/test_reading.py::test_a_mask_on_its_side_is_suspected_of_exif",
    ],
    "D16 one process needs NCCL and a GPU": [
        "engine/test_distributed.py::test_without_torchrun_there_is_one_process_and_no_group",
    ],
    "D17 cuDNN deterministic and benchmark at once; all ranks draw the same augmentation": [
        "engine/test_distributed.py::test_cudnn_is_deterministic_or_searches_for_speed_never_both",
        "engine/test_distributed.py::test_ranks_draw_different_random_numbers",
        "data/test_loading.py::test_ranks_do_not_share_their_augmentation",
    ],
    "D18 the loss on probabilities has no gradient where they saturate": [
        "test_losses.py::test_values_are_those_of_the_parents_probability_formulas",
        "test_losses.py::"
        "test_saturated_logits_give_finite_losses_and_gradients_that_still_point_back",
    ],
    "D19 the best model is chosen on the test set": [
        "test_train.py::test_validation_on_training_images_is_refused",
    ],
    "D20 evaluation scores the untuned weights": [
        "test_train.py::test_evaluation_scores_what_was_trained",
    ],
    "D21 loading the base hides missing and misnamed tensors": [
        "models/test_weights.py::test_missing_tensor_is_named",
        "adapters/test_contract.py::test_names_and_counts_of_the_base_stay",
    ],
    "D22 a run cannot be resumed": [
        "engine/test_trainer.py::test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit",
        "engine/test_distributed.py::test_interrupted_on_two_ranks_and_resumed_equals_uninterrupted",
        "test_run_sa.py::test_a_signal_saves_and_the_next_launch_goes_on_exactly",
    ],
    "D23 the IoU head, which no loss reads, breaks DistributedDataParallel": [
        "engine/test_distributed.py::test_a_trained_head_that_no_loss_reads_breaks_ddp",
        "adapters/test_contract.py::test_what_trains_and_what_does_not",
    ],
    "D24 W&B demands a login and watches every frozen weight": [
        "engine/test_logbook.py::"
        "test_wandb_hears_of_each_epoch_under_the_parents_names_and_watches_nothing",
        "engine/test_logbook.py::test_without_a_key_the_real_wandb_logs_offline_and_asks_nothing",
    ],
    "D25 scores under the true mask's box are told without saying so": [
        "engine/test_evaluator.py::test_a_result_states_the_prompt_that_the_model_was_given",
        "test_run_sa.py::test_eval_sh_on_one_process_repeats_the_scores_of_two",
    ],
}
NOT_TESTED = {
    "D26 frozen image embeddings are computed anew in each epoch": "Slow, not wrong: there is no "
    "cache yet whose results could differ.",
}


def test_the_list_is_complete():
    numbers = {defect.split()[0] for defect in [*GUARDED, *NOT_TESTED]}
    assert numbers == {f"D{number}" for number in range(1, 27)}


@pytest.mark.parametrize("defect", GUARDED)
def test_each_defect_has_its_guards(defect):
    for place in GUARDED[defect]:
        file, name = place.split("::")
        tree = ast.parse((TESTS / file).read_text())
        assert name in {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}, place
