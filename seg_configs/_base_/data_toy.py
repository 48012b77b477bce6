# Laid over any config of this folder by `--data toy`: the embedded data set (tools/make_toy_data.py data/toy), and a
# head and schedule small enough to learn from scratch in minutes on a CPU. The backbone stays as it is.
classes = ("background", "circle", "square", "triangle", "star", "ring", "cross", "digit")
palette = [
    (90, 90, 90),
    (230, 57, 53),
    (48, 99, 230),
    (250, 190, 40),
    (240, 85, 170),
    (40, 200, 215),
    (65, 185, 75),
    (150, 90, 225),
]
crop_size = (128, 128)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomResize", scale=crop_size, ratio_range=(0.8, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
dataset = dict(
    type="BaseSegDataset",
    data_root="data/toy/ade",
    img_suffix=".jpg",
    seg_map_suffix=".png",
    reduce_zero_label=True,
    metainfo=dict(classes=classes, palette=palette),
)
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    pin_memory=False,  # a CPU has nothing to pin for
    dataset=dict(
        _delete_=True,
        **dataset,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    num_workers=1,
    dataset=dict(
        _delete_=True,
        **dataset,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(drop_path_rate=0.0),
    decode_head=dict(num_classes=len(classes), channels=64, norm_cfg=norm_cfg, dropout_ratio=0.0),
    auxiliary_head=dict(num_classes=len(classes), channels=64, norm_cfg=norm_cfg, dropout_ratio=0.0),
    test_cfg=dict(_delete_=True, mode="whole"),
)

optim_wrapper = dict(
    optimizer=dict(lr=1e-3, weight_decay=0.01),
    paramwise_cfg=dict(layer_decay_rate=1.0),  # from scratch, the stem learns like the rest
)
max_iters = 200
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=20),
    dict(type="PolyLR", eta_min=1e-6, power=1.0, by_epoch=False, begin=20, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=max_iters // 2, save_best=None),
)
custom_hooks = [
    dict(type="CheckDataHook"),
    dict(type="FiniteStepsHook"),
    dict(type="EvaluateFirstHook"),
    dict(type="DataOrderHook"),
]
randomness = dict(seed=0)
