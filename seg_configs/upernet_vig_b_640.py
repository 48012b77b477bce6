# UperNet on ViG-B: the outputs of blocks 3, 6, 9 and 12 (stride 16), resized to strides 4, 8, 16 and 32, at 640 x 640.
_base_ = "./_base_/upernet_ade20k_160k_640.py"
model = dict(
    backbone=dict(_delete_=True, type="ViG", arch="base", out_indices=(2, 5, 8, 11), drop_path_rate=0.4),
    neck=dict(type="Feature2Pyramid", embed_dim=768, rescales=[4, 2, 1, 0.5]),
    decode_head=dict(in_channels=[768] * 4),
    auxiliary_head=dict(in_channels=768),
    test_cfg=dict(mode="slide", crop_size=(640, 640), stride=(426, 426)),
)
