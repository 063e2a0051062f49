"How do other libraries and papers call it? Words that people type, and what they are called here."

# For each argument: a word in lower case, with underscores, and what to write here.
VALUES = {
    'granularity': {
        **dict.fromkeys(('unstructured', 'fine_grained', 'element', 'elementwise', 'individual', 'parameter'), "'weight'"),
        **dict.fromkeys(('structured', 'output_channel', 'out_channel', 'out_channels', 'neuron', 'neurons', 'unit'), "'filter'"),
        **dict.fromkeys(('input_channel', 'in_channel', 'in_channels'), "'channel'"),
        **dict.fromkeys(('2:4', 'n:m', 'nm', 'semi_structured'), "context='2:4'"),
        **dict.fromkeys(('block', 'blocks', 'block_sparse'), 'block(4, 4)'),
        **dict.fromkeys(('head', 'heads', 'attention_head'), 'head(8), with the number of heads'),
    },
    'context': {
        **dict.fromkeys(('layerwise', 'layer_wise', 'layer', 'per_layer', 'uniform'), "'local'"),
        **dict.fromkeys(('globally', 'network', 'model', 'all', 'unstructured'), "'global'"),
        **dict.fromkeys(('er', 'erdos_renyi', 'erdos_renyi_kernel'), "'erk'"),
        **dict.fromkeys(('2_4', '2/4', '2of4', 'n:m', 'nm', 'semi_structured'), "'2:4'"),
    },
    'criteria': {
        **dict.fromkeys(('l1', 'l1_norm', 'l1norm', 'ln', 'l2', 'l2_norm', 'abs', 'weight', 'large_final'), "'magnitude'"),
        **dict.fromkeys(('saliency', 'taylor', 'snip', 'grad', 'gradients', 'first_order', 'sensitivity'), "'gradient'"),
        **dict.fromkeys(('random', 'rand'), 'lambda weight: torch.rand_like(weight)'),
    },
    'schedule': {
        **dict.fromkeys(('agp', 'cubic', 'polynomial', 'poly', 'zhu_gupta', 'sched_agp'), "'gradual'"),
        **dict.fromkeys(('oneshot', 'sched_oneshot', 'immediate', 'once'), "'one_shot'"),
        **dict.fromkeys(('multi_step', 'steps', 'sched_iterative', 'imp'), "'iterative'"),
        **dict.fromkeys(('cos', 'sched_cos', 'annealing_cos', 'cosine_annealing'), "'cosine'"),
        **dict.fromkeys(('lin', 'sched_lin'), "'linear'"),
        **dict.fromkeys(('onecycle', 'sched_onecycle'), "'one_cycle'"),
        **dict.fromkeys(('dsd', 'sched_dsd'), "'dense_sparse_dense'"),
    },
}

# Names of arguments, and what to write here.
ARGUMENTS = {
    **dict.fromkeys(('criterion', 'importance', 'method', 'saliency'), 'criteria='),
    **dict.fromkeys(('amount', 'target_sparsity', 'final_sparsity', 'end_sparsity', 'ratio', 'pruning_ratio', 'sparsities'), 'sparsity='),
    **dict.fromkeys(('scope', 'local', 'global_pruning', 'pattern'), 'context='),
    **dict.fromkeys(('structure', 'pruning_type', 'group'), 'granularity='),
    **dict.fromkeys(('sched', 'sched_func', 'schedule_func', 'scheduler'), 'schedule='),
    **dict.fromkeys(('start', 'end', 'start_epoch', 'end_epoch', 'begin_step', 'end_step'), 'schedule=gradual(start=.1, end=.75)'),
    **dict.fromkeys(('layer', 'layer_type', 'modules', 'parameters', 'targets'), 'layers='),
    **dict.fromkeys(('example_input', 'example_inputs', 'inputs', 'x'), 'example='),
    **dict.fromkeys(('min_weights', 'floor'), 'min_keep='),
}

# Names of methods and attributes of a Sparsifier, and what to write here.
METHODS = {
    **dict.fromkeys(('prune', 'sparsify', 'prune_model', 'step', 'compress', 'apply'), 'sparsify_model(50)'),
    **dict.fromkeys(('prune_layer',), "sparsify_layer('name', 50)"),
    **dict.fromkeys(('mask', 'get_masks'), "masks['name']"),
    **dict.fromkeys(('mask_weights', 'mask_model', 'apply_mask', 'restore_masks'), 'apply_masks()'),
    **dict.fromkeys(('summary', 'print_sparsity', 'get_sparsity', 'stats'), 'report()'),
    **dict.fromkeys(('remove', 'finalize', 'make_permanent'), 'detach(); the weights hold the zeros, and there is nothing to remove'),
}
