//! A decoder of the Llama class on Burn, for training: what `lm` computes for serving, with gradients. Owns the names of its weights in a Hugging Face folder.

use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::JobError;
use crate::lm::{DecoderConfig, Weights};
use crate::train::NamedTensor;
use crate::train::fused::{self, Heads};
use crate::train::layers::Init;
use crate::train::precision::rows;

/// Of the first weights: transformers' `initializer_range`.
const DEVIATION: f32 = 0.02;

/// Fields are named as in a Hugging Face folder. Matrices are [inputs, outputs]; those that have the same inputs stand side by side in one.
#[derive(Module, Debug)]
pub(crate) struct Net {
    embed_tokens: Projection,
    layers: Vec<Layer>,
    norm: Norm,
    /// None: the embedding's.
    lm_head: Option<Projection>,
}

#[derive(Module, Debug)]
struct Layer {
    input_layernorm: Norm,
    self_attn: SelfAttention,
    post_attention_layernorm: Norm,
    mlp: Mlp,
}

#[derive(Module, Debug)]
struct SelfAttention {
    qkv_proj: Projection,
    o_proj: Projection,
}

#[derive(Module, Debug)]
struct Mlp {
    gate_up_proj: Projection,
    down_proj: Projection,
}

#[derive(Module, Debug)]
struct Norm {
    weight: Param<Tensor<1>>,
}

#[derive(Module, Debug)]
struct Projection {
    weight: Param<Tensor<2>>,
    bias: Option<Param<Tensor<1>>>,
}

impl Net {
    pub fn new(init: &Init<'_>, shape: &DecoderConfig) -> Self {
        let (hidden, ffn) = (shape.hidden, shape.ffn);
        let queries = shape.heads * shape.head_size;
        let qkv = queries + 2 * shape.kv_heads * shape.head_size;
        let norm = || Norm { weight: init.constant([hidden], 1.0) };
        let projection = |name: &str, size: [usize; 2], bias: bool| Projection {
            weight: init.normal_of(&format!("{name}.weight"), size, DEVIATION),
            bias: bias.then(|| init.constant([size[1]], 0.0)),
        };
        let layer = |at: usize| {
            let projection =
                |name: &str, size: [usize; 2], bias| projection(&format!("layers.{at}.{name}"), size, bias);
            Layer {
                input_layernorm: norm(),
                self_attn: SelfAttention {
                    qkv_proj: projection("self_attn.qkv_proj", [hidden, qkv], shape.qkv_bias),
                    o_proj: projection("self_attn.o_proj", [queries, hidden], false),
                },
                post_attention_layernorm: norm(),
                mlp: Mlp {
                    gate_up_proj: projection("mlp.gate_up_proj", [hidden, 2 * ffn], false),
                    down_proj: projection("mlp.down_proj", [ffn, hidden], false),
                },
            }
        };
        Self {
            embed_tokens: projection("embed_tokens", [shape.vocab, hidden], false),
            layers: (0..shape.layers).map(layer).collect(),
            norm: norm(),
            lm_head: (!shape.tied_embeddings).then(|| projection("lm_head", [hidden, shape.vocab], false)),
        }
    }

    /// Logits [texts * length, vocabulary] of what follows each token of texts that are `heads.length` long, one behind the other.
    pub fn forward(&self, shape: &DecoderConfig, heads: &Heads, tokens: Vec<i32>, device: &Device) -> Tensor<2> {
        let count = tokens.len();
        let tokens = Tensor::<1, Int>::from_data(TensorData::new(tokens, [count]), device);
        let mut x = rows(self.embed_tokens.weight.val(), tokens);
        for layer in &self.layers {
            let normed = layer.input_layernorm.forward(x.clone(), shape);
            let mixed = fused::attention(layer.self_attn.qkv_proj.forward(normed), heads);
            x = x + layer.self_attn.o_proj.forward(mixed);
            let normed = layer.post_attention_layernorm.forward(x.clone(), shape);
            let gated = fused::swiglu(layer.mlp.gate_up_proj.forward(normed));
            x = x + layer.mlp.down_proj.forward(gated);
        }
        let x = self.norm.forward(x, shape);
        match &self.lm_head {
            Some(head) => head.forward(x),
            None => fused::product(x, self.embed_tokens.weight.val(), true),
        }
    }
}

impl Norm {
    fn forward(&self, x: Tensor<2>, shape: &DecoderConfig) -> Tensor<2> {
        fused::rms_norm(x, self.weight.val(), shape.rms_epsilon)
    }
}

impl Projection {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let y = fused::product(x, self.weight.val(), false);
        match &self.bias {
            Some(bias) => y + bias.val().unsqueeze(),
            None => y,
        }
    }
}

/// How a weight of ours stands in a Hugging Face folder.
enum Theirs {
    Same(String),
    /// [outputs, inputs].
    Transposed(String),
    /// Columns of ours, each so many wide, are matrices of their own, or values of a bias.
    Parts(Vec<(String, usize)>),
}

/// `name` is `model.<path>`.
fn theirs(name: &str, shape: &DecoderConfig) -> Theirs {
    let (queries, shared) = (shape.heads * shape.head_size, shape.kv_heads * shape.head_size);
    let parts = |of: &str, parts: &[(&str, usize)]| {
        Theirs::Parts(parts.iter().map(|(part, width)| (name.replace(of, part), *width)).collect())
    };
    match name {
        _ if name.contains(".qkv_proj.") => {
            parts("qkv_proj", &[("q_proj", queries), ("k_proj", shared), ("v_proj", shared)])
        }
        _ if name.contains(".gate_up_proj.") => {
            parts("gate_up_proj", &[("gate_proj", shape.ffn), ("up_proj", shape.ffn)])
        }
        "model.lm_head.weight" => Theirs::Transposed("lm_head.weight".to_owned()),
        _ if name.ends_with("_proj.weight") => Theirs::Transposed(name.to_owned()),
        _ => Theirs::Same(name.to_owned()),
    }
}

/// Rows and columns of a matrix, or of a bias as one row.
fn sizes(shape: &[usize]) -> (usize, usize) {
    match *shape {
        [rows, columns] => (rows, columns),
        _ => (1, shape.iter().product()),
    }
}

/// [rows, columns] as [columns, rows].
fn transposed(values: &[f32], (rows, columns): (usize, usize)) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    for column in 0..columns {
        out.extend((0..rows).map(|row| values[row * columns + column]));
    }
    out
}

/// Weights of ours, whose names and shapes were checked, as a Hugging Face folder has them.
pub(crate) fn to_hugging_face(weights: Vec<NamedTensor>, shape: &DecoderConfig) -> Vec<NamedTensor> {
    let mut out = Vec::new();
    for NamedTensor { name, shape: size, values } in weights {
        let (rows, columns) = sizes(&size);
        let is_matrix = size.len() == 2;
        let theirs_of = |width: usize| if is_matrix { vec![width, rows] } else { vec![width] };
        match theirs(&name, shape) {
            Theirs::Same(name) => out.push(NamedTensor { name, shape: size, values }),
            Theirs::Transposed(name) => {
                let values = transposed(&values, (rows, columns));
                out.push(NamedTensor { name, shape: theirs_of(columns), values });
            }
            Theirs::Parts(parts) => {
                let values = transposed(&values, (rows, columns));
                let mut rest = &values[..];
                for (name, width) in parts {
                    let (part, after) = rest.split_at(width * rows);
                    out.push(NamedTensor { name, shape: theirs_of(width), values: part.to_vec() });
                    rest = after;
                }
            }
        }
    }
    out
}

/// Whether a folder's weights are as large as its `config.json` says.
pub(crate) fn check_shapes(weights: &Weights, shape: &DecoderConfig) -> Result<(), JobError> {
    let check = |name: &str, size: &[usize]| weights.shaped(name, size).map(drop).map_err(JobError::Model);
    check("model.embed_tokens.weight", &[shape.vocab, shape.hidden])?;
    for layer in 0..shape.layers {
        let of = |name: &str| format!("model.layers.{layer}.{name}.weight");
        check(&of("self_attn.q_proj"), &[shape.heads * shape.head_size, shape.hidden])?;
        check(&of("self_attn.k_proj"), &[shape.kv_heads * shape.head_size, shape.hidden])?;
        check(&of("mlp.down_proj"), &[shape.hidden, shape.ffn])?;
    }
    Ok(())
}

/// The weights of a model of ours with this layout, from a Hugging Face folder.
pub(crate) fn from_hugging_face(
    weights: &Weights,
    layout: &crate::train::Layout,
    shape: &DecoderConfig,
) -> Result<Vec<NamedTensor>, JobError> {
    let read = |name: &str, size: &[usize]| -> Result<Vec<f32>, JobError> {
        Ok(weights.shaped(name, size).map_err(JobError::Model)?.dequantise())
    };
    let mut out = Vec::new();
    for param in &layout.params {
        let name = format!("model.{}", param.path);
        let (rows, columns) = sizes(&param.shape);
        let is_matrix = param.shape.len() == 2;
        let theirs_of = |width: usize| if is_matrix { vec![width, rows] } else { vec![width] };
        let values = match theirs(&name, shape) {
            Theirs::Same(name) => read(&name, &param.shape)?,
            Theirs::Transposed(name) => transposed(&read(&name, &theirs_of(columns))?, (columns, rows)),
            Theirs::Parts(parts) => {
                let mut all = Vec::with_capacity(param.len);
                for (name, width) in parts {
                    all.extend(read(&name, &theirs_of(width))?);
                }
                transposed(&all, (columns, rows))
            }
        };
        out.push(NamedTensor { name, shape: param.shape.clone(), values });
    }
    Ok(out)
}
