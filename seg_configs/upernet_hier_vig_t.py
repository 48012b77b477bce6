# UperNet on ViG-H-T: the native pyramid of strides 4, 8, 16 and 32.
_base_ = "./_base_/upernet_ade20k_160k.py"
model = dict(
    backbone=dict(_delete_=True, type="HierViG", arch="tiny", drop_path_rate=0.2),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
