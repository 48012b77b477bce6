# COCO, 1x (12 epochs) at 800 x 1333, batch 16 (8 GPUs x 2 or any other split; see auto_scale_lr): everything but the
# model. Data set, schedule and runtime come from the installed mmdet; the settings are those that Swin and VMamba
# publish: AdamW 1e-4, weight decay 0.05 but none on 1-D parameters, 1,000 steps of warm-up, steps at epochs 8 and 11.
_base_ = [
    "mmdet::_base_/datasets/coco_instance.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
]
custom_imports = dict(imports=["vig_backbone"], allow_failed_imports=False)

# The stock pipeline, from transforms that are lighter and give the same; a batch travels as one block of memory.
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="FastLoadDetAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", scale=(1333, 800), keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="FastPackDetInputs"),
]
train_dataloader = dict(
    num_workers=4,
    collate_fn=dict(type="packed_collate"),
    pin_memory=True,
    dataset=dict(pipeline=train_pipeline),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
optim_wrapper = dict(
    _delete_=True,
    type="FiniteOptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
    constructor="ViGOptimWrapperConstructor",  # no decay of 1-D parameters; paramwise_cfg.layer_decay_rate
)
default_hooks = dict(
    runtime_info=dict(type="DeferredRuntimeInfoHook"),
    checkpoint=dict(type="AtomicCheckpointHook", interval=1, max_keep_ckpts=2, save_best="coco/segm_mAP"),
)
custom_hooks = [dict(type="CheckDataHook"), dict(type="FiniteStepsHook"), dict(type="DataOrderHook")]

# Test-time augmentation (`--tta`): three scales, each also mirrored. Boxes only: mmdet merges no masks.
tta_model = dict(
    type="BoxTTAModel",
    tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100),
)
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale=scale, keep_ratio=True) for scale in [(1333, 640), (1333, 800), (1333, 960)]],
            [dict(type="RandomFlip", prob=0.0), dict(type="RandomFlip", prob=1.0)],
            [dict(type="LoadAnnotations", with_bbox=True)],
            [
                dict(
                    type="PackDetInputs",
                    meta_keys=(
                        *("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
                        *("flip", "flip_direction"),
                    ),
                )
            ],
        ],
    ),
]
