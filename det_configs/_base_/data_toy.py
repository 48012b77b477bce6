# Laid over any config of this folder by `--data toy`: the embedded data set (tools/make_toy_data.py data/toy), and
# heads and a schedule small enough to learn from scratch in minutes on a CPU. The backbone stays as it is.
classes = ("circle", "square", "triangle", "star", "ring", "cross", "digit")
palette = [(230, 57, 53), (48, 99, 230), (250, 190, 40), (240, 85, 170), (40, 200, 215), (65, 185, 75), (150, 90, 225)]
scale = (128, 128)
data_root = "data/toy/coco/"

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
meta_keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction")
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=scale, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=meta_keys[:5]),
]
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale=scale, keep_ratio=True)],
            [dict(type="RandomFlip", prob=0.0), dict(type="RandomFlip", prob=1.0)],
            [dict(type="LoadAnnotations", with_bbox=True)],
            [dict(type="PackDetInputs", meta_keys=meta_keys)],
        ],
    ),
]
metainfo = dict(classes=classes, palette=palette)
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    pin_memory=False,  # a CPU has nothing to pin for
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline),
)
val_dataloader = dict(num_workers=1, dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator

channels = 64
model = dict(
    backbone=dict(drop_path_rate=0.0),
    neck=dict(out_channels=channels),
    rpn_head=dict(in_channels=channels, feat_channels=channels),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels),
        bbox_head=dict(in_channels=channels, fc_out_channels=256, num_classes=len(classes)),
        mask_roi_extractor=dict(out_channels=channels),
        mask_head=dict(num_convs=2, in_channels=channels, conv_out_channels=channels, num_classes=len(classes)),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=300, max_per_img=100),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100), rcnn=dict(max_per_img=20)),
)

optim_wrapper = dict(
    optimizer=dict(lr=5e-4, weight_decay=0.01),
    clip_grad=dict(max_norm=10),
    paramwise_cfg=dict(layer_decay_rate=1.0),  # from scratch, the stem learns like the rest
)
max_epochs = 12  # of 20 steps each
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=20),
    dict(type="CosineAnnealingLR", by_epoch=True, convert_to_iter_based=True, begin=0, end=max_epochs, eta_min=1e-6),
]
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=max_epochs // 2, save_best=None),
)
custom_hooks = [
    dict(type="CheckDataHook"),
    dict(type="FiniteStepsHook"),
    dict(type="EvaluateFirstHook"),
    dict(type="DataOrderHook"),
]
randomness = dict(seed=0)
