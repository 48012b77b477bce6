# UperNet on ViG-H-B: the native pyramid of strides 4, 8, 16 and 32, at 640 x 640.
_base_ = "./_base_/upernet_ade20k_160k_640.py"
model = dict(
    backbone=dict(_delete_=True, type="HierViG", arch="base", drop_path_rate=0.6),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
