"""What an ONNX file may hold on a device: fields, operators, number types. Tables only, no code, no I/O.

Fields follow onnx.proto (onnx-ml.proto) up to IR version 14 of onnx 1.23; operators were read up to opset 28.
A newer file is refused until somebody has read what is new in it.
"""

from __future__ import annotations

from edge_cascade.protobuf_wire import Kind, Schema, many, one, refused

IR_VERSIONS = range(3, 15)  # 3 brought opset_import
OPSETS = range(7, 29)  # onnxruntime supports 7 and up
DEFAULT_DOMAINS = frozenset({"", "ai.onnx"})  # two names of the same operator set

ENTRY = Schema("StringStringEntryProto", {1: one("key", Kind.TEXT), 2: one("value", Kind.TEXT)})

TENSOR = Schema(
    "TensorProto",
    {
        1: many("dims", Kind.INT64),
        2: one("data_type", Kind.INT32),
        3: refused("segment", "runtimes do not read tensors in pieces"),
        4: many("float_data", Kind.FIXED32),
        5: many("int32_data", Kind.VARINTS),
        6: refused("string_data", "a classifier has no use for strings"),
        7: many("int64_data", Kind.VARINTS),
        8: one("name", Kind.TEXT),
        9: one("raw_data", Kind.BYTES),
        10: many("double_data", Kind.FIXED64),
        11: many("uint64_data", Kind.VARINTS),
        12: one("doc_string", Kind.TEXT),
        13: many("external_data", Kind.MESSAGE),
        14: one("data_location", Kind.INT32),
        16: many("metadata_props", Kind.MESSAGE),
    },
)

_SUBGRAPH = "a graph within a node is control flow, and can nest until the runtime's stack overflows"
_SPARSE = "sparse tensors let a few bytes ask for any amount of memory"
_TYPES = "a type may nest without end, and only control flow needs it"

ATTRIBUTE = Schema(
    "AttributeProto",
    {
        1: one("name", Kind.TEXT),
        2: one("f", Kind.FIXED32),
        3: one("i", Kind.INT64),
        4: one("s", Kind.TEXT),  # bytes in onnx.proto, "UTF-8 string" in its comment
        5: one("t", Kind.MESSAGE),
        6: refused("g", _SUBGRAPH),
        7: many("floats", Kind.FIXED32),
        8: many("ints", Kind.VARINTS),
        9: many("strings", Kind.TEXT),
        10: many("tensors", Kind.MESSAGE),
        11: refused("graphs", _SUBGRAPH),
        13: one("doc_string", Kind.TEXT),
        14: refused("tp", _TYPES),
        15: refused("type_protos", _TYPES),
        20: one("type", Kind.INT32),
        21: one("ref_attr_name", Kind.TEXT),
        22: refused("sparse_tensor", _SPARSE),
        23: refused("sparse_tensors", _SPARSE),
    },
)
ATTRIBUTE_VALUES = {
    1: "f",
    2: "i",
    3: "s",
    4: "t",
    6: "floats",
    7: "ints",
    8: "strings",
    9: "tensors",
}  # AttributeType -> the one field that may hold the value; graphs, sparse tensors and types have none

NODE = Schema(
    "NodeProto",
    {
        1: many("input", Kind.TEXT),
        2: many("output", Kind.TEXT),
        3: one("name", Kind.TEXT),
        4: one("op_type", Kind.TEXT),
        5: many("attribute", Kind.MESSAGE),
        6: one("doc_string", Kind.TEXT),
        7: one("domain", Kind.TEXT),
        8: one("overload", Kind.TEXT),
        9: many("metadata_props", Kind.MESSAGE),
        10: refused("device_configurations", "a stage runs on one device"),
    },
)

DIMENSION = Schema(
    "TensorShapeProto.Dimension",
    {1: one("dim_value", Kind.INT64), 2: one("dim_param", Kind.TEXT), 3: one("denotation", Kind.TEXT)},
)
SHAPE = Schema("TensorShapeProto", {1: many("dim", Kind.MESSAGE)})
TENSOR_TYPE = Schema("TypeProto.Tensor", {1: one("elem_type", Kind.INT32), 2: one("shape", Kind.MESSAGE)})
_NO_TENSOR = "values between operators are dense tensors"
TYPE = Schema(
    "TypeProto",
    {
        1: one("tensor_type", Kind.MESSAGE),
        4: refused("sequence_type", _NO_TENSOR),
        5: refused("map_type", _NO_TENSOR),
        6: one("denotation", Kind.TEXT),
        7: refused("opaque_type", _NO_TENSOR),
        8: refused("sparse_tensor_type", _NO_TENSOR),
        9: refused("optional_type", _NO_TENSOR),
    },
)
VALUE_INFO = Schema(
    "ValueInfoProto",
    {
        1: one("name", Kind.TEXT),
        2: one("type", Kind.MESSAGE),
        3: one("doc_string", Kind.TEXT),
        4: many("metadata_props", Kind.MESSAGE),
    },
)

GRAPH = Schema(
    "GraphProto",
    {
        1: many("node", Kind.MESSAGE),
        2: one("name", Kind.TEXT),
        5: many("initializer", Kind.MESSAGE),
        10: one("doc_string", Kind.TEXT),
        11: many("input", Kind.MESSAGE),
        12: many("output", Kind.MESSAGE),
        13: many("value_info", Kind.MESSAGE),
        14: refused("quantization_annotation", "QuantizeLinear nodes say the same where runtimes read it"),
        15: refused("sparse_initializer", _SPARSE),
        16: many("metadata_props", Kind.MESSAGE),
    },
)

OPSET = Schema("OperatorSetIdProto", {1: one("domain", Kind.TEXT), 2: one("version", Kind.INT64)})
MODEL = Schema(
    "ModelProto",
    {
        1: one("ir_version", Kind.INT64),
        2: one("producer_name", Kind.TEXT),
        3: one("producer_version", Kind.TEXT),
        4: one("domain", Kind.TEXT),
        5: one("model_version", Kind.INT64),
        6: one("doc_string", Kind.TEXT),
        7: one("graph", Kind.MESSAGE),
        8: many("opset_import", Kind.MESSAGE),
        14: many("metadata_props", Kind.MESSAGE),
        20: refused("training_info", "a stage is not trained by its own file"),
        25: refused("functions", "local functions call each other until the runtime's stack overflows"),
        26: refused("configuration", "a stage runs on one device"),
    },
)

# TensorProto.DataType -> (numpy's name, bytes per element, the typed field that may hold the elements).
# No strings, no complex numbers, nothing that numpy does not know (bfloat16, float8, 4 and 2 bit).
DTYPES = {
    1: ("float32", 4, "float_data"),
    2: ("uint8", 1, "int32_data"),
    3: ("int8", 1, "int32_data"),
    4: ("uint16", 2, "int32_data"),
    5: ("int16", 2, "int32_data"),
    6: ("int32", 4, "int32_data"),
    7: ("int64", 8, "int64_data"),
    9: ("bool", 1, "int32_data"),
    10: ("float16", 2, "int32_data"),
    11: ("float64", 8, "double_data"),
    12: ("uint32", 4, "uint64_data"),
    13: ("uint64", 8, "uint64_data"),
}
STRING_DTYPE = 8

# Left out on purpose: control flow (If, Loop, Scan), sequences and optionals, strings (also TfIdfVectorizer),
# chance (Random*, Bernoulli, Multinomial, and Dropout for its training switch), decoders and detectors
# (ImageDecoder, NonMaxSuppression, RoiAlign, GridSample, MaxUnpool), and what no classifier is made of.
_ELEMENTWISE = """
    Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor
    Ceil Celu Clip Cos Cosh Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid
    HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or
    PRelu Pow Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum
    SwiGLU Swish Tan Tanh ThresholdedRelu Where Xor
"""
_LAYERS = """
    Attention AveragePool BatchNormalization Conv ConvTranspose Einsum GRU Gemm GlobalAveragePool
    GlobalLpPool GlobalMaxPool GroupNormalization Hardmax InstanceNormalization LRN LSTM
    LayerNormalization LogSoftmax LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization
    RMSNormalization RNN RotaryEmbedding Softmax
"""
_INT8 = """
    ConvInteger DequantizeLinear DynamicQuantizeLinear MatMulInteger QLinearConv QLinearMatMul QuantizeLinear
"""
_REDUCTIONS = """
    ArgMax ArgMin CumSum ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum ReduceSumSquare TopK
"""
_SHAPES = """
    Cast CastLike Concat Constant ConstantOfShape DepthToSpace Expand EyeLike Flatten Gather
    GatherElements GatherND NonZero OneHot Pad Range Reshape Resize ReverseSequence ScatterElements
    ScatterND Shape Size Slice SpaceToDepth Split Squeeze Tile Transpose Trilu Unsqueeze Upsample
"""
_SIGNALS = "BlackmanWindow DFT HammingWindow HannWindow MelWeightMatrix STFT"
_TRAIN_STEPS = "Col2Im NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss"
OPERATORS = frozenset(
    " ".join((_ELEMENTWISE, _LAYERS, _INT8, _REDUCTIONS, _SHAPES, _SIGNALS, _TRAIN_STEPS)).split()
)
