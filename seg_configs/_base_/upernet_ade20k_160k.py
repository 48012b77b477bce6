# UperNet on ADE20K, 160k iterations at 512 x 512, batch 16 (8 GPUs x 2 or any other split; see auto_scale_lr).
# Model, data set, schedule and runtime come from the installed mmsegmentation; the settings are those that Swin, VMamba
# and Vision-RWKV publish: AdamW, weight decay 0.01 but none on 1-D parameters, 1,500 steps of warm-up, linear decay.
_base_ = [
    "mmseg::_base_/models/upernet_swin.py",
    "mmseg::_base_/datasets/ade20k.py",
    "mmseg::_base_/schedules/schedule_160k.py",
    "mmseg::_base_/default_runtime.py",
]
custom_imports = dict(imports=["vig_backbone"], allow_failed_imports=False)

crop_size = (512, 512)
model = dict(
    type="FusedEncoderDecoder",  # "EncoderDecoder" does the same with logits of full resolution
    data_preprocessor=dict(type="FastSegPreprocessor", size=crop_size),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)

# The stock pipeline, from transforms that are lighter and give the same; a batch travels as one block of memory.
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomResize", scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="FastRandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="FastPhotoMetricDistortion"),
    dict(type="FastPackSegInputs"),
]
train_dataloader = dict(
    batch_size=2,
    collate_fn=dict(type="packed_collate"),
    pin_memory=True,
    dataset=dict(pipeline=train_pipeline),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)

optim_wrapper = dict(
    _delete_=True,
    type="FiniteOptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01, fused=True),
    constructor="ViGOptimWrapperConstructor",  # no decay of 1-D parameters; paramwise_cfg.layer_decay_rate
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=160000),
]
default_hooks = dict(
    runtime_info=dict(type="DeferredRuntimeInfoHook"),
    checkpoint=dict(type="AtomicCheckpointHook", interval=8000, max_keep_ckpts=2, save_best="mIoU"),
)
custom_hooks = [dict(type="CheckDataHook"), dict(type="FiniteStepsHook"), dict(type="DataOrderHook")]
