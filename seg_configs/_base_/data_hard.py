# Laid over any config of this folder, or over a stock UperNet of mmseg, by `--data hard`: the harder embedded data set
# (tools/make_toy_data.py data/hard --difficulty hard --size 256x384 --train 1600 --val 160): 17 classes, shapes of any
# colour and digits from 15 to 128 pixels, on vivid photos. With a schedule that learns it from scratch in minutes on a
# GPU. tools/compare_training.py trains several models by it. Backbone and pyramid stay as they are.
classes = (
    *("background", "circle", "square", "triangle", "star", "ring", "cross"),
    *(f"digit_{digit}" for digit in range(10)),
)
palette = [
    *[(90, 90, 90), (230, 57, 53), (48, 99, 230), (250, 190, 40), (240, 85, 170), (40, 200, 215), (65, 185, 75)],
    *[(150, 90, 225), (255, 127, 14), (188, 189, 34), (140, 86, 75), (0, 128, 128), (220, 190, 255)],
    *[(170, 255, 195), (128, 0, 0), (0, 0, 128), (255, 215, 180)],
]
custom_imports = dict(imports=["vig_backbone"], allow_failed_imports=False)
crop_size = (256, 256)

# No mirroring: a mirrored digit is none.
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomResize", scale=(384, 256), ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
dataset = dict(
    type="BaseSegDataset",
    data_root="data/hard/ade",
    img_suffix=".jpg",
    seg_map_suffix=".png",
    reduce_zero_label=True,
    metainfo=dict(classes=classes, palette=palette),
)
train_dataloader = dict(
    batch_size=16,
    num_workers=4,
    dataset=dict(
        _delete_=True,
        **dataset,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=4,
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
    backbone=dict(drop_path_rate=0.1),
    decode_head=dict(num_classes=len(classes), channels=256, norm_cfg=norm_cfg),
    auxiliary_head=dict(num_classes=len(classes), channels=128, norm_cfg=norm_cfg),
    test_cfg=dict(_delete_=True, mode="whole"),
)

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=5e-4, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=5),
    paramwise_cfg=dict(layer_decay_rate=1.0),  # from scratch, the stem learns like the rest
)
max_iters = 1600  # 16 times all images
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=0, end=max_iters, eta_min=1e-6),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters // 8)
default_hooks = dict(checkpoint=dict(interval=max_iters // 2, save_best=None))
custom_hooks = [
    dict(type="CheckDataHook"),
    dict(type="FiniteStepsHook"),
    dict(type="EvaluateFirstHook"),
    dict(type="DataOrderHook"),
]
randomness = dict(seed=0)
