# UperNet on ViG-H-S: the native pyramid of strides 4, 8, 16 and 32.
_base_ = "./_base_/upernet_ade20k_160k.py"
model = dict(
    backbone=dict(_delete_=True, type="HierViG", arch="small", drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
