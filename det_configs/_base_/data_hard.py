# Laid over any config of this folder, or over a stock Mask R-CNN of mmdet, by `--data hard`: the harder embedded data
# set (tools/make_toy_data.py data/hard --difficulty hard --size 256x384 --train 1600 --val 160): 16 classes, shapes of
# any colour and digits from 15 to 128 pixels, on vivid photos. With a schedule that learns it from scratch in minutes
# on a GPU. tools/compare_training.py trains several models by it. Backbone, neck and the widths of heads stay as they
# are.
classes = ("circle", "square", "triangle", "star", "ring", "cross", *(f"digit_{digit}" for digit in range(10)))
palette = [
    *[(230, 57, 53), (48, 99, 230), (250, 190, 40), (240, 85, 170), (40, 200, 215), (65, 185, 75)],
    *[(150, 90, 225), (255, 127, 14), (188, 189, 34), (140, 86, 75), (0, 128, 128), (220, 190, 255)],
    *[(170, 255, 195), (128, 0, 0), (0, 0, 128), (255, 215, 180)],
]
custom_imports = dict(imports=["vig_backbone"], allow_failed_imports=False)
scale = (576, 384)  # one and a half times the images' size: objects begin at 15 pixels, anchors at 32
data_root = "data/hard/coco/"

# No mirroring: a mirrored digit is none.
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomResize", scale=scale, ratio_range=(0.75, 1.25), keep_ratio=True),
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
            [dict(type="Resize", scale=each, keep_ratio=True) for each in [(480, 320), scale, (672, 448)]],
            [dict(type="RandomFlip", prob=0.0)],
            [dict(type="LoadAnnotations", with_bbox=True)],
            [dict(type="PackDetInputs", meta_keys=meta_keys)],
        ],
    ),
]
metainfo = dict(classes=classes, palette=palette)
train_dataloader = dict(
    batch_size=16,
    num_workers=4,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=4,
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator

model = dict(
    backbone=dict(drop_path_rate=0.1),
    roi_head=dict(bbox_head=dict(num_classes=len(classes)), mask_head=dict(num_classes=len(classes))),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=1000, max_per_img=300),
        rcnn=dict(sampler=dict(num=128)),  # for at most 12 objects an image
    ),
    test_cfg=dict(rpn=dict(nms_pre=1000, max_per_img=300)),
)

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=4e-4, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=10),
    paramwise_cfg=dict(layer_decay_rate=1.0),  # from scratch, the stem learns like the rest
)
max_epochs = 16  # of 100 steps each
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs // 8)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", by_epoch=True, convert_to_iter_based=True, begin=0, end=max_epochs, eta_min=1e-6),
]
default_hooks = dict(checkpoint=dict(interval=max_epochs // 2, save_best=None))
custom_hooks = [
    dict(type="CheckDataHook"),
    dict(type="FiniteStepsHook"),
    dict(type="EvaluateFirstHook"),
    dict(type="DataOrderHook"),
]
randomness = dict(seed=0)
