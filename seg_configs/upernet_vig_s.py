# UperNet on ViG-S: the outputs of blocks 3, 6, 9 and 12 (stride 16), resized to strides 4, 8, 16 and 32.
_base_ = "./_base_/upernet_ade20k_160k.py"
model = dict(
    backbone=dict(_delete_=True, type="ViG", arch="small", out_indices=(2, 5, 8, 11), drop_path_rate=0.2),
    neck=dict(type="Feature2Pyramid", embed_dim=384, rescales=[4, 2, 1, 0.5]),
    decode_head=dict(in_channels=[384] * 4),
    auxiliary_head=dict(in_channels=384),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
