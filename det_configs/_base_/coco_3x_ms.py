# COCO, 3x (36 epochs, steps at 27 and 33), images of several sizes, half of them cropped, as Swin publishes it.
_base_ = "./coco_1x.py"
sizes = [(1333, side) for side in range(480, 801, 32)]
resize = dict(type="RandomChoiceResize", scales=sizes, keep_ratio=True)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="FastLoadDetAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(
        type="RandomChoice",
        transforms=[
            [resize],
            [
                dict(type="RandomChoiceResize", scales=[(1333, 400), (1333, 500), (1333, 600)], keep_ratio=True),
                dict(type="RandomCrop", crop_type="absolute_range", crop_size=(384, 600), allow_negative_crop=True),
                resize,
            ],
        ],
    ),
    dict(type="FastPackDetInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
max_epochs = 36
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=max_epochs, milestones=[27, 33], gamma=0.1),
]
