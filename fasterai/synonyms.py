"List what other libraries and papers call things, and what to write here: errors offer it for unknown words."


def _rows(table):
    "Return {word: what to write} of a table {what to write: words}."
    return {word: meant for meant, words in table.items() for word in words.split()}


# For each argument what to write, and the words that mean it: in lower case, with underscores.
VALUES = {
    'granularity': _rows({
        "'weight'": 'unstructured fine_grained element elementwise individual parameter',
        "'filter'": 'structured output_channel out_channel out_channels neuron neurons unit',
        "'channel'": 'input_channel in_channel in_channels',
        "context='2:4'": '2:4 n:m nm semi_structured',
        'block(4, 4)': 'block blocks block_sparse',
        'head(8), with the number of heads': 'head heads attention_head',
    }),
    'context': _rows({
        "'local'": 'layerwise layer_wise layer per_layer uniform',
        "'global'": 'globally network model all unstructured',
        "'erk'": 'erdos_renyi_kernel',
        "'er'": 'erdos_renyi',
        "within('O')": 'row rowwise row_wise per_row per_output',
        "'2:4'": '2_4 2/4 2of4 n:m nm semi_structured',
    }),
    'criteria': _rows({
        "'magnitude'": 'l1 l1_norm l1norm ln l2 l2_norm abs weight large_final',
        "'gradient'": 'saliency snip grad gradients first_order sensitivity',
        "'taylor'": 'taylor_fo taylor_fo_weight',
        "'movement'": 'movement_pruning',
        "'squared'": 'square squares mean_square',
        "'magnitude_increase'": 'mag_inc mag_increase',
        "'random'": 'rand noise',
        "'obd'": 'optimal_brain_damage fisher diagonal_fisher hessian',
        "'obs'": 'optimal_brain_surgeon surgeon woodfisher',
        "'synflow'": 'synaptic_flow',
        "'ria'": 'relative_importance',
        "'sparsegpt'": 'sparse_gpt obc',
        "'alps'": 'admm',
        "'fpgm'": 'geometric_median',
    }),
    'repair': _rows({
        "'refit'": 'least_squares reconstruct reconstruction adaprune weights',
        "'batchnorm'": 'bn batch_norm recalibrate calibrate',
    }),
    'schedule': _rows({
        "'gradual'": 'agp cubic polynomial poly zhu_gupta sched_agp',
        "'one_shot'": 'oneshot sched_oneshot immediate once',
        "'iterative'": 'steps sched_iterative imp',
        "'cosine'": 'cos sched_cos annealing_cos cosine_annealing',
        "'linear'": 'lin sched_lin',
        "'one_cycle'": 'onecycle sched_onecycle',
        "'dense_sparse_dense'": 'dsd sched_dsd',
        "'exponential'": 'exp',
        "'multi_step'": 'multistep levels step',
        "'acdc'": 'ac_dc alternating',
        "'rigl'": 'set dynamic dst sparse_to_sparse',
        'gradual(every=steps(100), swap=.3)': 'granet',
    }),
    'recipe': _rows({
        "'accurate'": 'accuracy best quality',
    }),
    'regrow': _rows({
        "'gradient'": 'grad gradients rigl',
        "'random'": 'rand set',
        "'criterion'": 'criteria score magnitude',
    }),
}

# Names of arguments.
ARGUMENTS = _rows({
    'criteria=': 'criterion importance method saliency',
    'sparsity=': 'amount target_sparsity final_sparsity end_sparsity ratio pruning_ratio sparsities',
    'context=': 'scope local global_pruning pattern',
    'granularity=': 'structure pruning_type group',
    'sparsity=fit_to(model, x, data=batches, ms=5).sparsities, which chooses them by a budget': 'ms bytes',
    'steps=': 'n_steps num_steps total_steps max_steps num_training_steps',
    'schedule=': 'sched sched_func schedule_func scheduler',
    'schedule=gradual(start=.1, end=.75)': 'start end',
    'schedule=gradual(start=epochs(2), end=epochs(8))': 'start_epoch end_epoch',
    'schedule=gradual(start=steps(100), end=steps(900))': 'begin_step end_step',
    'schedule=gradual(every=steps(100))': 'every frequency pruning_frequency',
    'schedule=gradual(initial=50)': 'initial initial_sparsity start_sparsity',
    'schedule=rigl(swap=.3)': 'swap drop_fraction update_fraction',
    'regrow=': 'regrowth grow growth grow_method',
    'distil=': 'distill distillation distil_loss kd knowledge_distillation teacher',
    'recipe=': 'preset',
    'layers=': 'layer layer_type modules parameters targets',
    'example=': 'example_input example_inputs inputs x',
    'data=': 'dataloader dls dl batches calibration calibration_data',
    'loss_func=': 'loss loss_fn',
    'min_keep=': 'min_weights floor',
    'exclude=': 'ignored_layers ignore skip ignore_layers skip_layers exclude_layers',
})

# Names of methods and attributes of a Sparsifier.
METHODS = _rows({
    'sparsify_model(50)': 'prune sparsify prune_model step compress apply',
    "sparsify_layer('name', 50)": 'prune_layer',
    "masks['name']": 'mask get_masks',
    'apply_masks()': 'mask_weights mask_model apply_mask restore_masks',
    'report()': 'summary print_sparsity get_sparsity stats',
    'detach(); the weights hold the zeros, and there is nothing to remove': 'remove finalize make_permanent',
})
